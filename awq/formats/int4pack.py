"""int4pack: torch's own in-memory layout for 4-bit products on a CPU, never written to disk.

qweight uint8 [N, K/2] is what `torch.ops.aten._convert_weight_to_int4pack_for_cpu` makes of the
codes; the order of rows in it depends on the CPU, so it is asked of torch, not written down here.
scales bfloat16 [groups, N, 2] holds the scale and (8 − zero) · scale, with which torch computes;
qzeros int32 [groups, N] holds the float16 scale's bits + 65536 · zero, without which bfloat16 would
have lost three bits of the scale for good. N is the number of outputs rounded up to 64; what is
added holds zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.core.weight import QuantizedWeight
from awq.formats.base import Format, Shapes, transposed

ROWS = 64


def _packed(codes: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)


@cache
def row_order() -> Tensor:
    """int64 [B]: the row of each nibble, low half first, in the run of B nibbles that torch keeps
    for one input of B rows."""
    rows = torch.arange(ROWS)[:, None].expand(ROWS, 2)
    parts = (rows % 16, rows // 16, torch.arange(2).expand(ROWS, 2))
    low, high, inputs = (nibbles(_packed(part)).flatten().long() for part in parts)
    return (low + 16 * high)[: int((inputs == 0).long().cumprod(0).sum())]


def nibbles(data: Tensor) -> Tensor:
    """uint8 [..., n] → [..., 2n], low halves first."""
    return torch.stack((data & 15, data >> 4), -1).flatten(-2)


def _encode(weight: QuantizedWeight) -> dict[str, Tensor]:
    extra = -len(weight.codes) % ROWS
    grid = (
        torch.stack((weight.scales.view(torch.int16), weight.zeros.to(torch.int16)), -1)
        .view(torch.int32)
        .squeeze(-1)
    )
    offsets = (8 - weight.zeros.float()) * weight.scales.float()
    pair = torch.stack((weight.scales.float(), offsets), -1).transpose(0, 1)  # [groups, out, 2]

    return {
        "qweight": _packed(F.pad(weight.codes, (0, 0, 0, extra))),
        "qzeros": F.pad(transposed(grid), (0, extra)),
        "scales": F.pad(pair, (0, 0, 0, extra)).to(torch.bfloat16).contiguous(),
    }


def _decode(
    tensors: Mapping[str, Tensor],
    in_features: int,
    out_features: int,
    group_size: int,
) -> QuantizedWeight:
    order = row_order()
    # [block, in, B] in torch's order
    runs = nibbles(tensors["qweight"].view(-1, in_features, len(order) // 2))
    codes = runs[:, :, order.argsort()].transpose(1, 2).flatten(0, 1)[:out_features].contiguous()
    grid = (
        transposed(tensors["qzeros"][:, :out_features]).view(torch.int16).view(out_features, -1, 2)
    )

    return QuantizedWeight(
        codes, grid[..., 0].contiguous().view(torch.float16), grid[..., 1].to(torch.uint8)
    )


def _shapes(in_features: int, out_features: int, group_size: int) -> Shapes:
    groups = in_features // group_size
    outputs = -(-out_features // ROWS) * ROWS
    return {
        "qweight": ((outputs, in_features // 2), torch.uint8),
        "qzeros": ((groups, outputs), torch.int32),
        "scales": ((groups, outputs, 2), torch.bfloat16),
    }


def _reason(in_features: int, out_features: int, group_size: int) -> str | None:
    return f"in_features {in_features} is odd" if in_features % 2 else None


INT4PACK = Format("int4pack", _encode, _decode, _shapes, _reason)
