"""gemm, the format that everything reads: words run along the outputs, columns in the order 0 2 4 6 1 3 5 7.

qweight int32 [in, out/8], qzeros int32 [groups, out/8], scales float16 [groups, out].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from awq.core.weight import QuantizedWeight
from awq.formats.base import INVERSE, ORDER, Format, Shapes, pack_words, permute_blocks, unpack_words


def _encode(weight: QuantizedWeight) -> dict[str, Tensor]:
    return {
        "qweight": pack_words(permute_blocks(weight.codes.t(), ORDER)),
        "qzeros": pack_words(permute_blocks(weight.zeros.t(), ORDER)),
        "scales": weight.scales.t().contiguous(),
    }


def _decode(tensors: Mapping[str, Tensor], in_features: int, out_features: int, group_size: int) -> QuantizedWeight:
    codes = permute_blocks(unpack_words(tensors["qweight"]), INVERSE)
    zeros = permute_blocks(unpack_words(tensors["qzeros"]), INVERSE)
    return QuantizedWeight(codes.t().contiguous(), tensors["scales"].t().contiguous(), zeros.t().contiguous())


def _shapes(in_features: int, out_features: int, group_size: int) -> Shapes:
    groups = in_features // group_size
    return {
        "qweight": ((in_features, out_features // 8), torch.int32),
        "qzeros": ((groups, out_features // 8), torch.int32),
        "scales": ((groups, out_features), torch.float16),
    }


def _reason(in_features: int, out_features: int, group_size: int) -> str | None:
    return f"out_features {out_features} is not a multiple of 8" if out_features % 8 else None


GEMM = Format("gemm", _encode, _decode, _shapes, _reason)
