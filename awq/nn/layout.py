"""Moving the packed weights of a whole model to the layout of their device's backend, and joining
siblings."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from awq.core.weight import QuantizedWeight
from awq.errors import ConfigError
from awq.nn.linear import WQLinear
from awq.nn.packed_experts import ExpertStack

logger = logging.getLogger("awq.nn")


def prepare(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Moves every `WQLinear` and every stack of experts to the layout that serves activations of
    `dtype` on its device. Returns how many there are.

    dtype: None takes the model's own floating dtype (of its first parameter, float16 if it has
    none). A linear that is moved to another device later settles again at its first forward; call
    this before capturing a CUDA graph or compiling, where no linear settles and every layout still
    computes, but slowly.
    """
    if dtype is None:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float16)
    linears = [module for module in model.modules() if isinstance(module, (WQLinear, ExpertStack))]
    for linear in linears:
        linear.settle(dtype)
    if linears:
        _note_without_llvmlite(linears[0], dtype)

    return len(linears)


def _note_without_llvmlite(linear: WQLinear | ExpertStack, dtype: torch.dtype) -> None:
    """Says what a model on a CPU costs where the generated kernels cannot run."""
    if linear.qweight.device.type != "cpu" or linear.layout == "rows16":
        return
    if linear.layout == "int4pack":
        if dtype != torch.bfloat16:
            logger.warning(
                "4-bit linears compute in bfloat16 on this CPU, not in %s: the kernels need "
                "llvmlite.",
                dtype,
            )
        return
    logger.warning(
        "4-bit linears are made dense again at every call on this CPU, which is slow: the kernels "
        "need llvmlite "
        "(pip install llvmlite); awq.kernels.explain(linear) says why others do not serve."
    )


def restore(model: nn.Module) -> None:
    """Moves every `WQLinear` back to the layout of its checkpoint. The next forward outside of
    compilation undoes it."""
    for module in model.modules():
        if isinstance(module, (WQLinear, ExpertStack)):
            module.set_layout(module.format)


@torch.no_grad()
def concatenate_outputs(linears: Sequence[WQLinear]) -> WQLinear:
    """One linear for siblings that read the same input (q, k, v; gate, up): their outputs one after
    the other.

    The result copies the weights; replace the siblings with it to free them. Raises ConfigError
    when the numbers of inputs or the group sizes differ.
    """
    if len({(m.in_features, m.group_size) for m in linears}) != 1:
        found = ", ".join(f"{m.in_features} inputs in groups of {m.group_size}" for m in linears)
        raise ConfigError(
            "linears can be joined along their outputs when inputs and groups are the same, not "
            f"with {found}."
        )

    parts = [m.quantized() for m in linears]
    codes, scales, zeros = (torch.cat(tensors) for tensors in zip(*(part[:3] for part in parts)))
    weight = QuantizedWeight(codes, scales, zeros)
    biases = [m.bias for m in linears]
    dtype = next((b.dtype for b in biases if b is not None), None)

    bias: Tensor | None = None
    if dtype is not None:
        bias = torch.cat(
            [
                weight.scales.new_zeros(m.out_features, dtype=dtype) if m.bias is None else m.bias
                for m in linears
            ]
        )

    layout = linears[0].layout if len({m.layout for m in linears}) == 1 else None
    return WQLinear.from_quantized(weight, bias, linears[0].format, layout, linears[0].dtype)


@torch.no_grad()
def split_outputs(linear: WQLinear, sizes: Sequence[int]) -> list[WQLinear]:
    """Inverse of `concatenate_outputs`: linears of `sizes` outputs each. Raises ConfigError when
    they do not add up."""
    if sum(sizes) != linear.out_features:
        raise ConfigError(
            f"a linear of {linear.out_features} outputs cannot be split into {list(sizes)}."
        )

    parts = zip(*(tensor.split(list(sizes)) for tensor in linear.quantized()[:3]))
    biases = linear.bias.split(list(sizes)) if linear.bias is not None else [None] * len(sizes)

    return [
        WQLinear.from_quantized(
            QuantizedWeight(*part), bias, linear.format, linear.layout, linear.dtype
        )
        for part, bias in zip(parts, biases)
    ]


@torch.no_grad()
def take_outputs(linear: WQLinear, rows: Tensor) -> WQLinear:
    """A linear with outputs `rows` (int64) of the given one, in that order."""

    def taken(tensor: Tensor) -> Tensor:
        return tensor[rows.to(tensor.device)]

    codes, scales, zeros = map(taken, linear.quantized()[:3])
    weight = QuantizedWeight(codes, scales, zeros)
    bias = None if linear.bias is None else taken(linear.bias)

    return WQLinear.from_quantized(weight, bias, linear.format, linear.layout, linear.dtype)
