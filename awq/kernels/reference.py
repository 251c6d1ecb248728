"""The reference backend: dequantize, then an ordinary product. It is the specification that every other backend must equal.

It keeps no dense copy, so each call dequantizes anew: a 4096 × 4096 weight costs tens of milliseconds on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.formats import get_format


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reference runs everywhere."""
    return None


def dequantize(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, in_features: int, out_features: int, group_size: int, format: str
) -> Tensor:
    """Dense float32 weight [out, in] of packed tensors."""
    tensors = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    codes, scale, zeros, _ = get_format(format).unpack(tensors, in_features, out_features, group_size)
    # As `QuantizedWeight.dequantize`, bit for bit; the difference is taken in bytes and the product in place: 3 times faster.
    steps = codes.view(torch.int8).view(*zeros.shape, -1) - zeros.view(torch.int8).unsqueeze(-1)
    return steps.float().mul_(scale.float().unsqueeze(-1)).view(out_features, in_features)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times weightᵀ (float32 [out, in]) in x's dtype; float16 on a CPU in float32, which is 100 times faster."""
    dtype = torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype
    out = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return out.to(x.dtype)
