"""gemv: words run along the inputs, nibbles in natural order; scales and zeros padded with zeros.

qweight int32 [out, in/8], qzeros int32 [out, ZW], scales float16 [out, 8·ZW] with ZW = ceil(groups
/ 8), rounded up to a multiple of 2 for groups of 64 and of 4 for groups of 32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.core.weight import QuantizedWeight
from awq.formats.base import Format, Shapes, pack_words, unpack_words


def zero_words(in_features: int, group_size: int) -> int:
    """ZW: number of words that hold one output's zeros."""
    multiple = {64: 2, 32: 4}.get(group_size, 1)
    words = -(-(in_features // group_size) // 8)
    return -(-words // multiple) * multiple


def _encode(weight: QuantizedWeight) -> dict[str, Tensor]:
    width = 8 * zero_words(weight.codes.shape[1], weight.group_size)
    pad = (0, width - weight.scales.shape[1])
    return {
        "qweight": pack_words(weight.codes),
        "qzeros": pack_words(F.pad(weight.zeros, pad)),
        "scales": F.pad(weight.scales, pad),
    }


def _decode(
    tensors: Mapping[str, Tensor],
    in_features: int,
    out_features: int,
    group_size: int,
) -> QuantizedWeight:
    groups = in_features // group_size
    zeros = unpack_words(tensors["qzeros"])[:, :groups].contiguous()
    return QuantizedWeight(
        unpack_words(tensors["qweight"]), tensors["scales"][:, :groups].contiguous(), zeros
    )


def _shapes(in_features: int, out_features: int, group_size: int) -> Shapes:
    words = zero_words(in_features, group_size)
    return {
        "qweight": ((out_features, in_features // 8), torch.int32),
        "qzeros": ((out_features, words), torch.int32),
        "scales": ((out_features, 8 * words), torch.float16),
    }


def _reason(in_features: int, out_features: int, group_size: int) -> str | None:
    if in_features % 8:
        return f"in_features {in_features} is not a multiple of 8"
    return None


def _features(rows: int, columns: int) -> tuple[int, int]:
    return columns * 8, rows


GEMV = Format("gemv", _encode, _decode, _shapes, _reason, _features)
