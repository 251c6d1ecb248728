"""A module in the model's own code between fused blocks: its attention goes through our cache, its
states are kept beside it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from awq.generate.plan import Attention, OwnCode, map_templates
from awq.generate.run import operations as ops
from awq.generate.run.cache import LayerCache
from awq.generate.run.where import Prompt, Step
from awq.kernels.reference import decode as plain
from awq.nn.copies import copy_structure

_INTERFACE = "awq_fused"  # a name of our own in transformers' table
_attend: ContextVar[Callable[..., Any]] = ContextVar("awq_fused")
ALL_ATTENTION_FUNCTIONS[_INTERFACE] = lambda *args, **kwargs: _attend.get()(*args, **kwargs)


class OwnModule:
    """Runs an `OwnCode` on a copy of the block's module that shares its tensors."""

    def __init__(self, own: OwnCode, block: nn.Module) -> None:
        self.own = own
        # a copy: the live module's config tells other callers which attention to run
        self.module = copy_structure(block.get_submodule(own.name))
        for module in self.module.modules():
            config = getattr(module, "config", None)
            if config is not None and hasattr(config, "_attn_implementation"):
                config._attn_implementation = _INTERFACE

    def __call__(self, x: Tensor, cache: LayerCache, where: Prompt | Step) -> Tensor:
        """What the module gives for x [batch, tokens, features]."""
        positions = where.positions(x)
        call = map_templates(
            self.own.call,
            lambda table: where.looked_up(table, positions),
        )
        if self.own.cache is not None:
            call.kwargs[self.own.cache] = cache.states

        token = _attend.set(_Attending(self.own.attention, cache, where))
        try:
            return call.run(self.module, x).reshape(x.shape)
        finally:
            _attend.reset(token)


@dataclass
class _Attending:
    """Attention as transformers' interface asks for it, over a cache."""

    attention: Attention | None
    cache: LayerCache
    where: Prompt | Step

    def __call__(
        self,
        _module: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, None]:
        """q [batch, heads, tokens, head_dim], k and v alike, of the new tokens → [batch, tokens,
        heads, value_dim]."""
        a = self.attention
        assert a is not None
        if isinstance(self.where, Step):
            return self._step(a, self.where, q, k, v), None

        start = self.where.start
        seen = self.cache.until(start + q.shape[2])
        seen.k[:, :, start:] = k
        seen.v[:, :, start:] = v
        y = ops.attend_cached(q, seen, a)

        return y.transpose(1, 2).contiguous(), None

    def _step(self, a: Attention, where: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qkv = torch.cat([plain.heads_flat(part) for part in (q, k, v)], -1)
        y = ops.attend_step(qkv, a, None, None, self.cache, where.lengths, where.longest)
        return y.view(len(q), 1, a.heads, a.value_head)
