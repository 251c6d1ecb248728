"""What the operators ask of their tensors before a backend sees them.

Most backends hand addresses to machine code, which believes the sizes it is told: an input of another width would read or
write memory that is not its own. Every operator therefore checks widths, dtypes, devices and contiguity here, in one place,
and says what does not fit. It costs about a microsecond of a call.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from awq.errors import ConfigError
from awq.formats import get_layout
from awq.kernels.packed import Shape


@cache
def _expected(shape: Shape, layout: str) -> tuple[Any, ...]:
    """Shapes of qweight, qzeros and scales, then their dtypes."""
    tensors = get_layout(layout).shapes(*shape)
    each = [tensors[name] for name in ("qweight", "qzeros", "scales")]
    return tuple(size for size, _ in each) + tuple(dtype for _, dtype in each)


def check_input(x: Tensor, features: int, device: torch.device, what: str = "x") -> None:
    """x [..., features], of a floating dtype, on `device`. Raises ConfigError otherwise."""
    if x.dim() == 0 or x.shape[-1] != features or not x.is_floating_point() or x.device != device:
        raise ConfigError(
            f"{what} is {x.dtype} {list(x.shape)} on {x.device}; the linear takes floating numbers [..., {features}] on {device}."
        )


def check_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor, shape: Shape, layout: str, experts: int | None = None) -> None:
    """The packed tensors of a linear, or of a stack of `experts`, as their layout has them. Raises ConfigError otherwise."""
    found: tuple[Any, ...] = (qweight.shape, qzeros.shape, scales.shape, qweight.dtype, qzeros.dtype, scales.dtype)
    expected = _expected(shape, layout)
    if experts is not None:
        expected = tuple((experts, *size) for size in expected[:3]) + expected[3:]
    if found != expected:
        raise ConfigError(f"packed tensors of {shape} in layout {layout} are {_text(expected)}, not {_text(found)}.")
    device = qweight.device
    if qzeros.device != device or scales.device != device:
        raise ConfigError(f"packed tensors are on {device}, {qzeros.device} and {scales.device}; they must be on one device.")
    if not (qweight.is_contiguous() and qzeros.is_contiguous() and scales.is_contiguous()):
        raise ConfigError("packed tensors must be contiguous; call .contiguous() on them.")


def check_bias(bias: Tensor | None, size: tuple[int, ...], device: torch.device) -> None:
    """bias of `size`, of a floating dtype, on `device`. Raises ConfigError otherwise."""
    if bias is None:
        return
    if bias.shape != size or not bias.is_floating_point() or bias.device != device:
        raise ConfigError(f"the bias is {bias.dtype} {list(bias.shape)} on {bias.device}; it must be {list(size)} on {device}.")


def check_experts(experts: Tensor, weights: Tensor | None, count: int | None, device: torch.device) -> None:
    """Numbers of experts 0 … count − 1 [tokens, top_k] and their weights. Raises ConfigError otherwise.

    count None: the numbers are not looked at, as of tensors that have none. A GPU is not asked for them either, since that
    would stop it; who routes tokens there answers for them.
    """
    if experts.dtype not in (torch.int32, torch.int64) or experts.dim() != 2 or experts.device != device:
        raise ConfigError(
            f"experts are {experts.dtype} {list(experts.shape)} on {experts.device}; they must be int32 or int64 [tokens, top_k] "
            f"on {device}."
        )
    if weights is not None:
        if weights.shape != experts.shape or not weights.is_floating_point() or weights.device != device:
            raise ConfigError(
                f"weights are {weights.dtype} {list(weights.shape)} on {weights.device}; they must be floating numbers "
                f"{list(experts.shape)} on {device}."
            )
    if count is not None and device.type == "cpu" and experts.numel():
        lowest, highest = (int(t) for t in experts.aminmax())
        if lowest < 0 or highest >= count:
            raise ConfigError(f"experts are numbered {lowest} to {highest}, and there are {count}: 0 to {count - 1}.")


def _text(tensors: tuple[Any, ...]) -> str:
    sizes, dtypes = tensors[:3], tensors[3:]
    return ", ".join(f"{str(dtype)[6:]} {list(size)}" for size, dtype in zip(sizes, dtypes))
