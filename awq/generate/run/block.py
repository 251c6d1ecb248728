"""One fused decoder block: norm, qkv, attention with cache, output, norm, MLP, from a plan."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from awq.generate.plan import BlockPlan, Source
from awq.generate.run import operations as ops
from awq.generate.run.cache import LayerCache
from awq.generate.run.projection import Projection, join, joinable
from awq.kernels.reference.attention import attend
from awq.nn.blocks import hidden_of


@dataclass
class Prompt:
    """A piece of the prompts: its tokens are positions start, start + 1, … of every row."""

    start: int


@dataclass
class Step:
    """One new token per row. lengths: int32 [batch] on the device, tokens cached so far, which is
    the new one's position.

    longest: the largest of them, where the host knows it.
    """

    lengths: Tensor
    longest: int


class FusedBlock(nn.Module):
    """Runs a `BlockPlan` with the linears of a transformers block."""

    def __init__(self, plan: BlockPlan, block: nn.Module, merge: bool = False) -> None:
        super().__init__()
        self.plan = plan
        self.qkv = self._product(block, plan.qkv, merge)
        self.attention_out, self.mlp_out = (
            block.get_submodule(plan.attention_out),
            block.get_submodule(plan.mlp_out),
        )
        if plan.mixture is None:
            self.interleave, mlp_in = self._interleaved(block) if merge else (0, plan.mlp_in)
            self.mlp_in = self._product(block, mlp_in, merge)

    def forward(
        self, x: Tensor, branch: Tensor | None, cache: LayerCache, where: Prompt | Step
    ) -> tuple[Tensor, Tensor]:
        """x [batch, tokens, features] is the residual stream, to which `branch` is still to be
        added; returns both anew.

        The last addition is left to the next block, which can do it together with its norm.
        """
        p = self.plan
        x, normed = ops.add_norm(x, branch, p.factor, p.attention_norm)
        a = self.attention_out(self._attention(self.qkv(normed), cache, where))
        if p.attention_post_norm is not None:
            a = ops.normalize(a, p.attention_post_norm)
        if p.parallel:
            m = normed if p.mlp_norm is None else ops.normalize(x, p.mlp_norm)
            return x, a + self._mlp(m)
        x, normed = ops.add_norm(x, a, p.factor, p.mlp_norm)
        return x, self._mlp(normed)

    def _interleaved(self, block: nn.Module) -> tuple[int, Source]:
        """(n, n channels of the gate and n of up in turn) where product and activation are one
        kernel; else (0, as they are)."""
        p, linears = self.plan, [block.get_submodule(name) for name in self.plan.mlp_in.names]
        if not p.gated or p.activation_name is None or not joinable(linears, p.mlp_in):
            return 0, p.mlp_in
        count = ops.gate_interleave(linears[0])  # type: ignore[arg-type]
        if not count or len(p.mlp_in.rows) % (2 * count):
            return 0, p.mlp_in
        rows = p.mlp_in.rows.view(2, -1, count).transpose(0, 1).flatten()
        return count, Source(p.mlp_in.names, rows)

    def _product(self, block: nn.Module, source: Source, merge: bool) -> nn.Module:
        joined = join(block, source) if merge else None
        return Projection(block, source) if joined is None else joined

    def _mlp(self, x: Tensor) -> Tensor:
        p = self.plan
        if p.mixture is not None:
            y = hidden_of(self.mlp_out(x))
            return y if p.mlp_post_norm is None else ops.normalize(y, p.mlp_post_norm)
        if self.interleave and p.activation_name is not None:
            h = ops.gated(x, self.mlp_in, p.activation_name, self.interleave)  # type: ignore[arg-type]
        else:
            h = ops.activate(self.mlp_in(x), p.activation, p.activation_name, p.gated)
        y = self.mlp_out(h)
        return y if p.mlp_post_norm is None else ops.normalize(y, p.mlp_post_norm)

    def _attention(self, qkv: Tensor, cache: LayerCache, where: Prompt | Step) -> Tensor:
        if isinstance(where, Step):
            return ops.attend_step(
                qkv,
                self.plan.attention,
                self.plan.cos,
                self.plan.sin,
                cache,
                where.lengths,
                where.longest,
            )
        a, (batch, tokens, _) = self.plan.attention, qkv.shape
        q = ops.cache_prompt(qkv, a, self.plan.cos, self.plan.sin, cache, where.start)
        stop = where.start + tokens
        y = attend(q, cache.k[:, :, :stop], cache.v[:, :, :stop], a.scaling, a.softcap, a.window)
        return y.transpose(1, 2).reshape(batch, tokens, -1)
