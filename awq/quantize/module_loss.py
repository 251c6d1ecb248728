"""The exact objective of the paper: the change of the output of the module around a group of linears (eq. 4).

The enclosing module is the smallest one that contains every consumer of the group: the attention for q, k, v, the MLP for
gate and up, the linear itself when it stands alone, the whole block when one norm feeds attention and MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor, nn

from awq.config import AwqConfig
from awq.core.weight import round_to_nearest
from awq.folds import InputGroup
from awq.nn.blocks import hidden_of
from awq.nn.surgery import get_weight


def enclosing_module(names: tuple[str, ...]) -> str:
    """Name of the smallest module that contains all linears `names`; "" is the block itself."""
    if len(names) == 1:
        return names[0]
    return ".".join(commonprefix([name.split(".")[:-1] for name in names]))


def record_module_calls(block: nn.Module, name: str, run: Callable[[], Any]) -> list[tuple[tuple, dict]]:
    """Arguments of every call of one module while `run()` runs the block."""
    calls: list[tuple[tuple, dict]] = []

    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append((args, kwargs))

    handle = block.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return calls


def module_loss(
    block: nn.Module,
    group: InputGroup,
    calls: list[tuple[tuple, dict]],
    masks: list[Tensor | None],
    config: AwqConfig,
) -> Callable[[Tensor], float]:
    """loss(s): summed squared change of the enclosing module's output when the group's weights become Q(W s)/s.

    calls, masks: from `record_module_calls` and one bool [batch, tokens] per call (None: every token counts).
    """
    module = block.get_submodule(enclosing_module(group.consumers))
    weights = [get_weight(block.get_submodule(n)) for n in group.consumers]
    originals = [w.detach().clone() for w in weights]
    size = config.group_size_of(group.in_features, group.consumers[0])

    def outputs(index: int) -> Tensor:
        args, kwargs = calls[index]
        out = hidden_of(module(*args, **kwargs)).float()
        mask = masks[index]
        if mask is not None and out.shape[: mask.dim()] == mask.shape:
            out = out[mask]
        return out.reshape(-1, out.shape[-1])

    references = [outputs(i) for i in range(len(calls))]

    @torch.no_grad()
    def loss(s: Tensor) -> float:
        try:
            for weight, original in zip(weights, originals):
                scaled = original.float() * s
                weight.data.copy_(round_to_nearest(scaled, size, config.bits, config.zero_point).dequantize() / s)
            return sum(float((outputs(i) - ref).pow(2).sum()) for i, ref in enumerate(references))
        finally:
            for weight, original in zip(weights, originals):
                weight.data.copy_(original)

    return loss
