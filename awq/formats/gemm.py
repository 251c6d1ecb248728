"""gemm, the format that everything reads: words run along the outputs, columns in the order 0 2 4 6
1 3 5 7.

qweight int32 [in, out/8], qzeros int32 [groups, out/8], scales float16 [groups, out].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from awq.core.weight import QuantizedWeight
from awq.formats.base import Format, Shapes, transposed


# Column 4a + 2b + c of a run of eight lies in byte 2c + a of its word, in the low half for b = 0,
# else the high one. Whole rows are moved as bytes, never single nibbles, which makes a 4096 × 4096
# matrix some ten times faster.
def _pack_columns(values: Tensor) -> Tensor:
    """uint8 [out, n] of 0 … 15 → int32 [n, out/8]."""
    out, n = values.shape
    runs = values.reshape(out // 8, 2, 2, 2, n)  # [word, a, b, c, n]
    data = runs[:, :, 0] | (runs[:, :, 1] << 4)
    return transposed(data.permute(0, 3, 2, 1).reshape(out // 8, 4 * n).view(torch.int32))


def _unpack_columns(words: Tensor) -> Tensor:
    """int32 [n, out/8] → uint8 [out, n]; inverse of `_pack_columns`."""
    n, width = words.shape
    # [word, a, c, n]
    data = transposed(words).view(torch.uint8).view(width, n, 2, 2).permute(0, 3, 2, 1).contiguous()
    return torch.stack((data & 15, data >> 4), 2).view(8 * width, n)


def _encode(weight: QuantizedWeight) -> dict[str, Tensor]:
    return {
        "qweight": _pack_columns(weight.codes),
        "qzeros": _pack_columns(weight.zeros),
        "scales": transposed(weight.scales),
    }


def _decode(
    tensors: Mapping[str, Tensor],
    in_features: int,
    out_features: int,
    group_size: int,
) -> QuantizedWeight:
    codes = _unpack_columns(tensors["qweight"])
    zeros = _unpack_columns(tensors["qzeros"])
    return QuantizedWeight(codes, transposed(tensors["scales"]), zeros)


def _shapes(in_features: int, out_features: int, group_size: int) -> Shapes:
    groups = in_features // group_size
    return {
        "qweight": ((in_features, out_features // 8), torch.int32),
        "qzeros": ((groups, out_features // 8), torch.int32),
        "scales": ((groups, out_features), torch.float16),
    }


def _reason(in_features: int, out_features: int, group_size: int) -> str | None:
    if out_features % 8:
        return f"out_features {out_features} is not a multiple of 8"
    return None


def _features(rows: int, columns: int) -> tuple[int, int]:
    return rows, columns * 8


GEMM = Format("gemm", _encode, _decode, _shapes, _reason, _features, bijective=True)
