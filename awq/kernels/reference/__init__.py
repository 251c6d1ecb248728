"""The reference backend: dequantize, then an ordinary product. It is the specification that every
other backend must equal.

It takes every layout and keeps no dense copy, so each call dequantizes anew: a 4096 × 4096 weight
costs tens of milliseconds on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.kernels.packed import Packed, Shape

LAYOUT = None
_DECODE = (
    "add_norm",
    "activate",
    "gated",
    "split",
    "attend",
    "dense",
    "gate_interleave",
    "choose_token",
)
_MIXTURE = ("route", "add_norm_route", "expert_parts")
OPERATORS = dict.fromkeys(_DECODE, "awq.kernels.reference.decode") | dict.fromkeys(
    _MIXTURE, "awq.kernels.reference.mixture"
)


def why_not(device: torch.device, dtype: torch.dtype, shape: Shape | None) -> str | None:
    """The reference runs everywhere."""
    return None


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dense weight [out, in] of packed tensors; computed in float32."""
    return packed.unpack().dequantize(dtype)


def linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x [..., in] → [..., out] in x's dtype."""
    return product(x, dequantize(packed), bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times weightᵀ ([out, in], any float dtype) in x's dtype; float16 on a CPU in
    float32, 100 times faster."""
    dtype = torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype
    out = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return out.to(x.dtype)
