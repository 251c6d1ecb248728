"""The head with 4-bit weights, for `quantize_head`."""

from __future__ import annotations

from torch import nn

from awq.core.weight import round_to_nearest
from awq.nn.linear import WQLinear
from awq.nn.surgery import get_weight, is_linear


def quantized_head(head: nn.Module) -> nn.Module:
    """A packed copy of the head, rounded to nearest in groups of 128 (or what divides its inputs);
    itself when packed already."""
    if not is_linear(head):
        return head

    weight = get_weight(head)
    bias = getattr(head, "bias", None)
    size = next((s for s in (128, 64, 32) if weight.shape[1] % s == 0), weight.shape[1])
    linear = WQLinear.from_quantized(round_to_nearest(weight, size), bias)
    linear.settle(weight.dtype)

    return linear
