"""gemv_fast: int16 words, four output rows interleaved, inputs permuted inside runs of 32; scaled
zeros in float16.

qweight int16 [out/4, in], scales float16 [8·ZW, out], qzeros float16 [8·ZW, out] = −s·z. Inside
each run of 32 inputs the (4, 4, 2) view is transposed to (1, 0, 2) and each run of eight reordered
0 2 4 6 1 3 5 7; rows are interleaved by 4 with a stride of 64 inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.core.weight import QuantizedWeight
from awq.errors import ConfigError
from awq.formats.base import Format, Shapes, transposed
from awq.formats.gemv import zero_words

_ROWS, _STRIDE = 4, 64
_SLACK = 0.25  # bfloat16 scales, too
_SMALLEST_NORMAL = 2.0**-14  # of float16; below it products lose their bits


# The two permutations together: input 8k + 2m + d of a run of 32 is stored at 8m + 4d + k, and k =
# 2i + j makes j the half of a byte. So a code has the axes [out/4, row, in/64, half, i, j, m, d],
# its byte [out/4, in/64, row, half, m, d, i].
def _pack_rows(codes: Tensor) -> Tensor:
    """uint8 [out, in] of 0 … 15 → int16 [out/4, in]."""
    out, width = codes.shape
    axes = codes.reshape(out // _ROWS, _ROWS, width // _STRIDE, 2, 2, 2, 4, 2)
    data = axes[:, :, :, :, :, 0] | (axes[:, :, :, :, :, 1] << 4)
    return data.permute(0, 2, 1, 3, 5, 6, 4).reshape(out // _ROWS, 2 * width).view(torch.int16)


def _unpack_rows(words: Tensor) -> Tensor:
    """int16 [out/4, in] → uint8 [out, in]; inverse of `_pack_rows`."""
    quarter, width = words.shape
    data = words.contiguous().view(torch.uint8).view(quarter, width // _STRIDE, _ROWS, 2, 4, 2, 2)
    data = data.permute(0, 2, 1, 3, 6, 4, 5).contiguous()
    return torch.stack((data & 15, data >> 4), 5).view(_ROWS * quarter, width)


def _encode(weight: QuantizedWeight) -> dict[str, Tensor]:
    width = weight.codes.shape[1]
    pad = (0, 8 * zero_words(width, weight.group_size) - weight.scales.shape[1])
    scaled = -(weight.scales.float() * weight.zeros.float()).half()
    if scaled.isinf().any():
        largest = weight.scales.max().item()
        raise ConfigError(
            "gemv_fast stores scale · zero in float16, which overflows (largest scale "
            f"{largest:g}); use gemm."
        )
    return {
        "qweight": _pack_rows(weight.codes),
        "scales": transposed(F.pad(weight.scales, pad)),
        "qzeros": transposed(F.pad(scaled, pad)),
    }


def zeros_are_whole(scales: Tensor, qzeros: Tensor) -> bool:
    """Whether scaled zeros are scales times 0 … 15; other numbers are those of a broken file.

    Both as stored, [8·ZW, out]. Rounding to 16 bits moves a quotient by less than `_SLACK`, but in
    the smallest scales; and where it is 0, so is the scaled zero.
    """
    ratio = (-qzeros.float() / scales.float()).nan_to_num(torch.inf)
    whole = ratio.round()
    near = (ratio - whole).abs() <= _SLACK
    fits = torch.where(whole == 0, qzeros == 0, near & (whole >= 0) & (whole <= 15))
    smallest = _SMALLEST_NORMAL if scales.dtype == torch.float16 else 0.0
    blurred = (scales.abs() < smallest) & (scales != 0)

    return bool((fits | blurred | ((scales == 0) & (qzeros == 0))).all())


def _decode(
    tensors: Mapping[str, Tensor],
    in_features: int,
    out_features: int,
    group_size: int,
) -> QuantizedWeight:
    groups = in_features // group_size
    scales = transposed(tensors["scales"][:groups])

    # A scale of 0 (never ours) would give 0/0; its zero point has no effect.
    ratio = (-tensors["qzeros"][:groups].t().float() / scales.float()).nan_to_num(0.0)
    return QuantizedWeight(
        _unpack_rows(tensors["qweight"]), scales, ratio.round().clamp(0, 15).to(torch.uint8)
    )


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
    if in_features % _STRIDE:
        return f"in_features {in_features} is not a multiple of {_STRIDE}"
    return None


def _features(rows: int, columns: int) -> tuple[int, int]:
    return columns, rows * _ROWS


GEMV_FAST = Format("gemv_fast", _encode, _decode, _shapes, _reason, _features)
