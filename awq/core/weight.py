"""The canonical quantized weight, and plain group quantization to and from it.

One weight, many codecs: every algorithm of this package ends in a `QuantizedWeight`, and every
packed format is a pure function to and from it. Scales are rounded to float16 *before* the codes
are chosen, because float16 is what a checkpoint
stores: what was measured while quantizing is exactly what a reader gets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class QuantizedWeight(NamedTuple):
    """w[o, i] ≈ (codes[o, i] − zeros[o, g]) · scales[o, g] with g = i // group_size.

    codes: uint8 [out, in], 0 … 2**bits − 1.
    scales: float16 [out, groups], positive.
    zeros: uint8 [out, groups], 0 … 2**bits − 1.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int = 4

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dense weight [out, in] of `dtype`; computed in float32."""
        steps = self.steps().float().view(*self.scales.shape, -1)
        return steps.mul_(self.scales.float().unsqueeze(-1)).view(self.codes.shape).to(dtype)

    def steps(self) -> Tensor:
        """codes − zeros [out, in], in units of the scale: int8, or int16 for 8 bits."""
        if self.bits < 8:  # seen as bytes with a sign, without a copy
            codes = self.codes.view(torch.int8)
            zeros = self.zeros.view(torch.int8)
        else:
            codes = self.codes.to(torch.int16)
            zeros = self.zeros.to(torch.int16)
        return (codes.view(*zeros.shape, -1) - zeros.unsqueeze(-1)).view(codes.shape)


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """View [out, in] as [out, groups, group_size]."""
    return weight.view(weight.shape[0], -1, group_size)


def storable_scale(scale: Tensor) -> Tensor:
    """Scales as a checkpoint holds them: float16, positive and finite, returned as float32.

    The floor 2**-24 is float16's smallest step (a group of zeros would otherwise get scale 0).
    """
    return scale.clamp(2.0**-24, 65504.0).half().float()


def group_range(weight: Tensor, group_size: int, zero_point: bool = True) -> tuple[Tensor, Tensor]:
    """Lowest and highest value [out, groups] that the codes of each group must reach.

    The range always contains 0, because the zero point is clamped to the codes: a group of one sign
    would otherwise lose its far end. `zero_point=False` makes it symmetric.
    """
    groups = grouped(weight, group_size)
    if not zero_point:
        high = groups.abs().amax(-1)
        return -high, high

    low = groups.amin(-1).clamp(max=0)
    high = groups.amax(-1).clamp(min=0)

    return low, high


def scale_and_zero(
    low: Tensor,
    high: Tensor,
    bits: int = 4,
    zero_point: bool = True,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point (float32, same shape) of a range; arXiv 2306.00978 §3 and AutoAWQ's
    pseudo_quantize_tensor.

    s = (high − low).clamp(1e-5) / (2**bits − 1), z = round(−low / s) clamped to the codes. Without
    a zero point s = max|w| / (2**(bits−1) − 1) and z is the middle code.
    """
    top = 2**bits - 1
    if not zero_point:
        scale = storable_scale(high.clamp(min=1e-5) / (2 ** (bits - 1) - 1))
        return scale, torch.full_like(scale, 2 ** (bits - 1))

    scale = storable_scale((high - low).clamp(min=1e-5) / top)
    return scale, (-low / scale).round().clamp(0, top)


def quantize_nearest(weight: Tensor, scale: Tensor, zero: Tensor, bits: int = 4) -> QuantizedWeight:
    """Round each weight [out, in] to its nearest code under given scale and zero [out, groups]."""
    group_size = weight.shape[1] // scale.shape[1]
    codes = (grouped(weight.float(), group_size) / scale.unsqueeze(-1)).round() + zero.unsqueeze(-1)
    codes = codes.clamp(0, 2**bits - 1).to(torch.uint8).view(weight.shape)
    return QuantizedWeight(codes, scale.half(), zero.to(torch.uint8), bits)


def round_to_nearest(
    weight: Tensor,
    group_size: int,
    bits: int = 4,
    zero_point: bool = True,
) -> QuantizedWeight:
    """Min/max group quantization of a weight [out, in] (any float dtype), the baseline of every
    comparison.

    group_size: channels per group; −1 means the whole row. It must divide `in` (checked by
    `AwqConfig.group_size_of`).
    """
    size = weight.shape[1] if group_size == -1 else group_size
    low, high = group_range(weight.float(), size, zero_point)
    return quantize_nearest(weight, *scale_and_zero(low, high, bits, zero_point), bits)


def fake_quantize(weight: Tensor, scale: Tensor, zero: Tensor, bits: int = 4) -> Tensor:
    """Nearest representable values of a float32 weight [out, in], without building codes."""
    groups = grouped(weight, weight.shape[1] // scale.shape[1])
    codes = (groups / scale.unsqueeze(-1)).round_().add_(zero.unsqueeze(-1)).clamp_(0, 2**bits - 1)
    return codes.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).view(weight.shape)
