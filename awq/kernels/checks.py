"""What the operators ask of their tensors before a backend sees them.

Most backends hand addresses to machine code, which believes the sizes it is told: an input of
another width would read or write memory that is not its own. Every operator therefore checks
widths, dtypes, devices and contiguity here, in one place, and says what does not fit. It costs
about a microsecond of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor

from awq.config import PACKED_TENSORS
from awq.errors import ConfigError
from awq.formats import get_layout
from awq.kernels.packed import Shape


class Weight:
    """What the packed tensors of one linear must be: their shapes and dtypes in a layout, of which
    the fast check reads less."""

    __slots__ = ("dtypes", "layout", "numels", "shape", "sizes")

    def __init__(self, shape: Shape, layout: str) -> None:
        tensors = get_layout(layout).shapes(*shape)
        each = [tensors[name] for name in PACKED_TENSORS]
        self.shape = shape
        self.layout = layout
        self.sizes = [size for size, _ in each]
        self.numels = tuple(prod(size) for size in self.sizes)
        self.dtypes = tuple(dtype for _, dtype in each)


@cache
def weight_of(in_features: int, out_features: int, group_size: int, layout: str) -> Weight:
    return Weight(Shape(in_features, out_features, group_size), layout)


def check_input(x: Tensor, features: int, weight: Tensor, what: str = "x") -> None:
    """x [..., features], of a floating dtype, where `weight` is. Raises ConfigError otherwise."""
    fits = x.dim() and x.size(-1) == features and x.is_floating_point()
    # The number of a device is read faster than the device, and is the same (−1) of a CPU and of
    # tensors without data.
    if fits and x.get_device() == weight.get_device() and x.is_meta == weight.is_meta:
        return
    raise ConfigError(
        f"{what} is {x.dtype} {list(x.shape)} on {x.device}; the linear takes floating numbers "
        f"[..., {features}] on "
        f"{weight.device}."
    )


def check_weight(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    wanted: Weight,
    experts: int = 1,
) -> None:
    """The packed tensors of a linear, or of a stack of `experts`, have the sizes that a backend
    reads.

    Raises ConfigError otherwise. Sizes are compared as numbers of elements: it is those that keep a
    backend inside.
    """
    # Written out: this runs at every call of every linear, and a loop over the three would take
    # three times as long.
    codes, zeros, steps = wanted.numels
    index = qweight.get_device()
    if (
        qweight.numel() == codes * experts
        and qzeros.numel() == zeros * experts
        and scales.numel() == steps * experts
        and (qweight.dtype, qzeros.dtype, scales.dtype) == wanted.dtypes
        and qweight.is_contiguous()
        and qzeros.is_contiguous()
        and scales.is_contiguous()
        and qzeros.get_device() == index
        and scales.get_device() == index
    ):
        return

    found = ", ".join(map(_text, (qweight, qzeros, scales)))
    raise ConfigError(
        f"packed tensors of {wanted.shape} in layout {wanted.layout} are "
        f"{_wanted_text(wanted, experts)}, contiguous and on one "
        f"device; these are {found}."
    )


def check_bias(bias: Tensor, size: tuple[int, ...], device: torch.device) -> None:
    """bias of `size`, of a floating dtype, on `device`. Raises ConfigError otherwise."""
    if bias.shape != size or not bias.is_floating_point() or bias.device != device:
        raise ConfigError(
            f"the bias is {bias.dtype} {list(bias.shape)} on {bias.device}; it must be "
            f"{list(size)} on {device}."
        )


def check_experts(
    experts: Tensor,
    weights: Tensor | None,
    count: int | None,
    device: torch.device,
) -> None:
    """Numbers of experts 0 … count − 1 [tokens, top_k] and their weights. Raises ConfigError
    otherwise.

    count None: the numbers are not looked at, as of tensors that have none. A GPU is not asked for
    them either, since that would stop it: its kernels give NaN for numbers out of range.
    """
    if (
        experts.dtype not in (torch.int32, torch.int64)
        or experts.dim() != 2
        or experts.device != device
    ):
        raise ConfigError(
            f"experts are {experts.dtype} {list(experts.shape)} on {experts.device}; they must be "
            "int32 or int64 [tokens, top_k] "
            f"on {device}."
        )

    if weights is not None:
        if (
            weights.shape != experts.shape
            or not weights.is_floating_point()
            or weights.device != device
        ):
            raise ConfigError(
                f"weights are {weights.dtype} {list(weights.shape)} on {weights.device}; they "
                "must be floating numbers "
                f"{list(experts.shape)} on {device}."
            )

    if count is not None and device.type == "cpu" and experts.numel():
        check_expert_range([int(t) for t in experts.aminmax()], count)


def check_expert_range(numbers: Sequence[int], count: int) -> None:
    """Ascending numbers of experts out of 0 … count − 1. Raises ConfigError otherwise."""
    if numbers and (numbers[0] < 0 or numbers[-1] >= count):
        raise ConfigError(
            f"experts are numbered {numbers[0]} to {numbers[-1]}, and there are {count}: 0 to "
            f"{count - 1}."
        )


def _text(tensor: Tensor) -> str:
    kind = "" if tensor.is_contiguous() else ", not contiguous"
    return f"{str(tensor.dtype)[6:]} {list(tensor.shape)} on {tensor.device}{kind}"


def _wanted_text(wanted: Weight, experts: int) -> str:
    front = [] if experts == 1 else [experts]
    return ", ".join(
        f"{str(dtype)[6:]} {[*front, *size]}" for size, dtype in zip(wanted.sizes, wanted.dtypes)
    )
