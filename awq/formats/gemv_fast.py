"""gemv_fast: int16 words, four output rows interleaved, inputs permuted inside runs of 32; scaled zeros in float16.

qweight int16 [out/4, in], scales float16 [8·ZW, out], qzeros float16 [8·ZW, out] = −s·z. Inside each run of 32 inputs the
(4, 4, 2) view is transposed to (1, 0, 2) and each run of eight reordered 0 2 4 6 1 3 5 7; rows are interleaved by 4 with a
stride of 64 inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.core.weight import QuantizedWeight
from awq.formats.base import INVERSE, ORDER, Format, Shapes, permute_blocks
from awq.formats.gemv import zero_words

_ROWS, _STRIDE = 4, 64


def _encode(weight: QuantizedWeight) -> dict[str, Tensor]:
    out, width = weight.codes.shape
    codes = weight.codes.view(out, -1, 4, 4, 2).transpose(2, 3).reshape(out, width)
    codes = permute_blocks(codes, ORDER)
    # [out/4, 4, in/64, 64] → rows of one run of 64 stand side by side, then four consecutive nibbles make a word.
    codes = codes.view(out // _ROWS, _ROWS, width // _STRIDE, _STRIDE).transpose(1, 2)
    nibbles = codes.reshape(out // _ROWS, width // _STRIDE, _STRIDE, 4)
    data = torch.stack((nibbles[..., 0] | (nibbles[..., 1] << 4), nibbles[..., 2] | (nibbles[..., 3] << 4)), -1)
    pad = (0, 8 * zero_words(width, weight.group_size) - weight.scales.shape[1])
    scaled = -(weight.scales.float() * weight.zeros.float())
    return {
        "qweight": data.contiguous().view(torch.int16).reshape(out // _ROWS, width),
        "scales": F.pad(weight.scales, pad).t().contiguous(),
        "qzeros": F.pad(scaled.half(), pad).t().contiguous(),
    }


def _decode(tensors: Mapping[str, Tensor], in_features: int, out_features: int, group_size: int) -> QuantizedWeight:
    data = tensors["qweight"].contiguous().view(torch.uint8)
    nibbles = torch.stack((data & 15, data >> 4), -1)
    codes = nibbles.view(out_features // _ROWS, in_features // _STRIDE, _ROWS, _STRIDE).transpose(1, 2)
    codes = permute_blocks(codes.reshape(out_features, in_features), INVERSE)
    codes = codes.view(out_features, -1, 4, 4, 2).transpose(2, 3).reshape(out_features, in_features)
    groups = in_features // group_size
    scales = tensors["scales"][:groups].t().contiguous()
    zeros = (-tensors["qzeros"][:groups].t().float() / scales.float()).round().clamp(0, 15).to(torch.uint8)
    return QuantizedWeight(codes, scales, zeros)


def _shapes(in_features: int, out_features: int, group_size: int) -> Shapes:
    rows = 8 * zero_words(in_features, group_size)
    return {
        "qweight": ((out_features // _ROWS, in_features), torch.int16),
        "qzeros": ((rows, out_features), torch.float16),
        "scales": ((rows, out_features), torch.float16),
    }


def _reason(in_features: int, out_features: int, group_size: int) -> str | None:
    if out_features % _ROWS:
        return f"out_features {out_features} is not a multiple of {_ROWS}"
    return f"in_features {in_features} is not a multiple of {_STRIDE}" if in_features % _STRIDE else None


GEMV_FAST = Format("gemv_fast", _encode, _decode, _shapes, _reason)
