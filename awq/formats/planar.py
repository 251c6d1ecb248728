"""planar: an in-memory layout for the GPU kernels, never written to disk.

qweight int16 [K/128, N, 32] and scales int32 [groups, N], the float16 scale's bits + 65536 · zero;
qzeros is empty. K = inputs rounded up to 128 and N = outputs rounded up to 64; what is added holds
zeros. Nibble j of word i of a row is input 128·t + 32·j + i: four planes of 32 inputs. So two
neighbouring words, read as 32 bits, give two neighbouring inputs with one mask, any block of rows
of one t is contiguous, and blocks of 32 inputs never straddle groups of 32 or a multiple of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.core.weight import QuantizedWeight
from awq.formats.base import Format, Shapes, transposed

DEPTH, ROWS = 128, 64  # inputs of one word row; outputs are padded to a multiple of ROWS


def padded(in_features: int, out_features: int) -> tuple[int, int]:
    """(K, N): inputs and outputs rounded up to whole blocks."""
    return -(-in_features // DEPTH) * DEPTH, -(-out_features // ROWS) * ROWS


def _encode(weight: QuantizedWeight) -> dict[str, Tensor]:
    out_features, in_features = weight.codes.shape
    inputs, outputs = padded(in_features, out_features)
    extra = outputs - out_features

    # [out, t, byte, half, i]
    codes = F.pad(weight.codes, (0, inputs - in_features, 0, extra)).view(outputs, -1, 2, 2, 32)
    # [t, out, i, byte]
    data = (codes[:, :, :, 0] | (codes[:, :, :, 1] << 4)).permute(1, 0, 3, 2).contiguous()
    grid = (
        torch.stack((weight.scales.view(torch.int16), weight.zeros.to(torch.int16)), -1)
        .view(torch.int32)
        .squeeze(-1)
    )

    return {
        "qweight": data.view(torch.int16).squeeze(-1),
        "qzeros": data.new_empty(0),
        "scales": F.pad(transposed(grid), (0, extra)),
    }


def _decode(
    tensors: Mapping[str, Tensor],
    in_features: int,
    out_features: int,
    group_size: int,
) -> QuantizedWeight:
    words = tensors["qweight"][:, :out_features].contiguous()
    data = words.view(torch.uint8).view(*words.shape, 2).permute(1, 0, 3, 2)  # [out, t, byte, i]
    codes = (
        torch.stack((data & 15, data >> 4), 3)
        .reshape(out_features, -1)[:, :in_features]
        .contiguous()
    )
    grid = (
        transposed(tensors["scales"][:, :out_features]).view(torch.int16).view(out_features, -1, 2)
    )

    return QuantizedWeight(
        codes, grid[..., 0].contiguous().view(torch.float16), grid[..., 1].to(torch.uint8)
    )


def _shapes(in_features: int, out_features: int, group_size: int) -> Shapes:
    groups, (inputs, outputs) = in_features // group_size, padded(in_features, out_features)
    return {
        "qweight": ((inputs // DEPTH, outputs, 32), torch.int16),
        "qzeros": ((0,), torch.uint8),
        "scales": ((groups, outputs), torch.int32),
    }


def _reason(in_features: int, out_features: int, group_size: int) -> str | None:
    return None  # padding makes every shape fit


PLANAR = Format("planar", _encode, _decode, _shapes, _reason)
