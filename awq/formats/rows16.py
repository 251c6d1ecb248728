"""rows16: an in-memory layout for the CPU kernels, never written to disk.

qweight uint8 [N/16, K/8, 64]: byte 4·r + b of a word line holds, of row 16·n + r, input 8·k + b in
its low half and 8·k + 4 + b in its high half. So one line read as 64 bytes gives, after one mask or
one shift, four neighbouring inputs for each of 16 rows, which is what the byte products of CPUs
take, and a block of 16 rows is read front to back. scales float16 and qzeros uint8 are [N/16,
groups, 16]. N is the number of outputs rounded up to 16; what is added holds zeros.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.core.weight import QuantizedWeight
from awq.formats.base import Format, Shapes

ROWS, DEPTH = 16, 8


def _blocks(grid: Tensor) -> Tensor:
    """[out, groups] → [N/16, groups, 16]."""
    return (
        F.pad(grid, (0, 0, 0, -len(grid) % ROWS))
        .unflatten(0, (-1, ROWS))
        .transpose(1, 2)
        .contiguous()
    )


def _rows(blocks: Tensor, out_features: int) -> Tensor:
    """Inverse of `_blocks`."""
    return blocks.transpose(1, 2).flatten(0, 1)[:out_features].contiguous()


def _encode(weight: QuantizedWeight) -> dict[str, Tensor]:
    extra = -len(weight.codes) % ROWS
    codes = F.pad(weight.codes, (0, 0, 0, extra)) if extra else weight.codes.contiguous()

    # four bytes at a time: [n, row, k, half]
    words = codes.view(torch.int32).unflatten(0, (-1, ROWS)).unflatten(2, (-1, 2))
    data = (words[..., 0] | (words[..., 1] << 4)).transpose(1, 2).contiguous()

    return {
        "qweight": data.view(torch.uint8),
        "qzeros": _blocks(weight.zeros),
        "scales": _blocks(weight.scales),
    }


def _decode(
    tensors: Mapping[str, Tensor],
    in_features: int,
    out_features: int,
    group_size: int,
) -> QuantizedWeight:
    data = tensors["qweight"].view(torch.int32).transpose(1, 2)  # [n, row, k]
    words = torch.stack((data & 0x0F0F0F0F, (data >> 4) & 0x0F0F0F0F), 3)
    codes = words.view(torch.uint8).view(-1, in_features)[:out_features].contiguous()

    return QuantizedWeight(
        codes, _rows(tensors["scales"], out_features), _rows(tensors["qzeros"], out_features)
    )


def _shapes(in_features: int, out_features: int, group_size: int) -> Shapes:
    groups = in_features // group_size
    blocks = -(-out_features // ROWS)
    return {
        "qweight": ((blocks, in_features // DEPTH, 64), torch.uint8),
        "qzeros": ((blocks, groups, ROWS), torch.uint8),
        "scales": ((blocks, groups, ROWS), torch.float16),
    }


def _reason(in_features: int, out_features: int, group_size: int) -> str | None:
    if in_features % DEPTH:
        return f"in_features {in_features} is not a multiple of {DEPTH}"
    return None


ROWS16 = Format("rows16", _encode, _decode, _shapes, _reason)
