"""Search of each group's range: both ends shrink independently, the squared error weighted by the
group's own block of G.

AutoAWQ shrinks |w| symmetrically and measures the output error of each group on sampled tokens.
That error is exactly Δ_g G_gg Δ_gᵀ, so the block of the Gram matrix replaces the tokens, and the
two ends can be searched apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awq.backends import operator
from awq.core.weight import group_range, grouped, scale_and_zero

SHRINK = tuple(1 - k / 20 for k in range(10))  # 1.00 … 0.55, AutoAWQ's grid
# weights searched at once: a CPU's cache, a GPU's occupancy
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 25}


def block_diagonal(gram: Tensor, group_size: int) -> Tensor:
    """The diagonal blocks [groups, group_size, group_size] of a Gram matrix [in, in]."""
    groups = gram.shape[0] // group_size
    blocks = gram.view(groups, group_size, groups, group_size)
    index = torch.arange(groups, device=gram.device)
    return blocks[index, :, index, :]


def search_range(
    weight: Tensor,
    gram: Tensor,
    group_size: int,
    bits: int = 4,
    zero_point: bool = True,
) -> tuple[Tensor, Tensor]:
    """Scale and zero [out, groups] (float32) that minimise Δ_g G_gg Δ_gᵀ over the shrink grid; the
    full range is a candidate.

    weight: float32 [out, in]; gram: float32 [in, in].
    """
    blocks = block_diagonal(gram, group_size)
    best_range = operator("best_range", weight.device, weight.dtype)
    if best_range is not None:
        shrink = torch.tensor(SHRINK, dtype=torch.float32, device=weight.device)
        best = best_range(weight.contiguous(), blocks, shrink, bits, zero_point)
        if best is not None:
            return _range_of(weight, best.long(), shrink, group_size, bits, zero_point)

    chunk = _CHUNK.get(weight.device.type, _CHUNK["cuda"])
    rows = max(1, chunk // weight.shape[1])
    scales = []
    zeros = []

    for part in weight.split(rows):
        scale, zero = _search_rows(part, blocks, group_size, bits, zero_point)
        scales.append(scale)
        zeros.append(zero)

    return torch.cat(scales), torch.cat(zeros)


def _range_of(
    weight: Tensor,
    best: Tensor,
    shrink: Tensor,
    group_size: int,
    bits: int,
    zero_point: bool,
) -> tuple[Tensor, Tensor]:
    """Scale and zero of the candidates `best` [out, groups]: high factor · len(SHRINK) + low
    factor, or one for both."""
    low, high = group_range(weight, group_size, zero_point)
    high_factor = shrink[best // len(SHRINK) if zero_point else best]
    return scale_and_zero(low * shrink[best % len(SHRINK)], high * high_factor, bits, zero_point)


def _search_rows(
    weight: Tensor,
    blocks: Tensor,
    size: int,
    bits: int,
    zero_point: bool,
) -> tuple[Tensor, Tensor]:
    low, high = group_range(weight, size, zero_point)
    # [groups, rows, size]: one batched product per candidate
    groups = grouped(weight, size).transpose(0, 1).contiguous()
    best_loss = None
    best_scale = low
    best_zero = low

    for high_factor in SHRINK:
        for low_factor in SHRINK if zero_point else (high_factor,):
            scale, zero = scale_and_zero(low * low_factor, high * high_factor, bits, zero_point)
            s = scale.t().unsqueeze(-1)
            z = zero.t().unsqueeze(-1)
            delta = (
                (groups / s).round_().add_(z).clamp_(0, 2**bits - 1).sub_(z).mul_(s).sub_(groups)
            )
            loss = torch.bmm(delta, blocks).mul_(delta).sum(-1).t()
            if best_loss is None:
                best_loss = loss
                best_scale = scale
                best_zero = zero
                continue

            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)

    return best_scale, best_zero
