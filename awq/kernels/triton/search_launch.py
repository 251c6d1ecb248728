"""The searches of the quantizer on a GPU: `best_range`, `scaled_losses`, `round_block` and
`descend_block`.

Their plain code, which they must equal, is in `awq.core`: `ranges`, `scales`, `rounding` and
`refinement`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from awq.kernels.triton import rounding, search
from awq.kernels.triton.launcher import launch

MAX_RANGE_GROUP = 128  # channels of a group whose block of G fits on the chip
MAX_SCALE_GROUP = 1 << 14  # channels of a group that one program holds
SCALED_PROGRAM_WEIGHTS = 4096
ROUNDED_ROWS = 32  # by one program
TILES_TOGETHER = 8


def _capability(device: torch.device) -> tuple[int, int]:
    """NVIDIA's compute capability; (0, 0) elsewhere."""
    if device.type != "cuda" or torch.version.hip is not None:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


def _code_range(bits: int, zero_point: bool) -> tuple[float, float, float]:
    """The highest code; steps of a range and their inverse, as `search._scale_and_zero` takes
    them."""
    steps = 2**bits - 1 if zero_point else 2 ** (bits - 1) - 1
    return float(2**bits - 1), float(steps), 1 / steps


def best_range(
    weight: Tensor,
    blocks: Tensor,
    shrink: Tensor,
    bits: int,
    zero_point: bool,
) -> Tensor | None:
    """The best candidate of every group, uint8 [out, groups]: high factor · len(shrink) + low
    factor, or one factor for both.

    weight: float32 [out, in], contiguous; blocks: float32 [groups, size, size]; shrink: float32
    factors. None for groups of more than `MAX_RANGE_GROUP` channels.
    """
    out, width = weight.shape
    groups, size, _ = blocks.shape
    if size > MAX_RANGE_GROUP:
        return None

    best = torch.empty(out, groups, dtype=torch.uint8, device=weight.device)
    rows, warps = search.range_tile(_capability(weight.device))
    launch(
        search.best_range_kernel,
        (triton.cdiv(out, rows), groups),
        weight.device,
        weight,
        blocks,
        shrink,
        best,
        out,
        width,
        groups,
        *_code_range(bits, zero_point),
        size,
        STEPS=len(shrink),
        SIZE=max(16, triton.next_power_of_2(size)),
        ROWS=rows,
        ZERO_POINT=zero_point,
        num_warps=warps,
    )

    return best


def scaled_losses(
    weight: Tensor,
    upper: Tensor,
    scales: Tensor,
    group_size: int,
    bits: int,
    zero_point: bool,
) -> Tensor | None:
    """tr(Δ G Δᵀ) [n], Δ = Q(W s)/s − W, for several s [n, in]; None for groups of more than
    `MAX_SCALE_GROUP` channels.

    weight: float32 [out, in], contiguous; upper: bfloat16 [in, in], the diagonal of G and twice
    what is above it, zeros below.
    Sums are made in one order: two calls give the same bits.
    """
    if group_size > MAX_SCALE_GROUP:
        return None

    delta = _scaled_deltas(weight, scales, group_size, bits, zero_point, upper.dtype)
    rows, width = delta.shape
    tile = search.tile_for(_capability(weight.device))
    tiles_c = triton.cdiv(width, tile.columns)
    partial = torch.empty(tiles_c, rows, dtype=torch.float32, device=weight.device)
    launch(
        search.row_losses_kernel,
        (triton.cdiv(rows, tile.rows) * tiles_c,),
        weight.device,
        delta,
        upper,
        partial,
        rows,
        width,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        TOGETHER=TILES_TOGETHER,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )

    return partial.sum(0).view(len(scales), -1).sum(1)


def _scaled_deltas(
    weight: Tensor,
    scales: Tensor,
    group_size: int,
    bits: int,
    zero_point: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Q(W s)/s − W of all s [n, in], rounded to `dtype`: [n · out, in]."""
    (out, width), count = weight.shape, len(scales)
    delta = torch.empty(count * out, width, dtype=dtype, device=weight.device)
    size = max(16, triton.next_power_of_2(group_size))
    rows = max(1, SCALED_PROGRAM_WEIGHTS // size)
    launch(
        search.scaled_delta_kernel,
        (triton.cdiv(out, rows), width // group_size, count),
        weight.device,
        weight,
        scales,
        delta,
        out,
        width,
        *_code_range(bits, zero_point),
        group_size,
        SIZE=size,
        ROWS=rows,
        ZERO_POINT=zero_point,
        num_warps=4 if size <= SCALED_PROGRAM_WEIGHTS else 16,
    )

    return delta


def round_block(
    rest: Tensor,
    factor: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_of: Tensor,
    codes: Tensor,
    errors: Tensor,
    start: int,
    stop: int,
    top: int,
) -> None:
    """As `awq.core.rounding._round_block`: rest, codes [in, out]; scales, zeros [groups, out]; all
    contiguous."""
    width, out = rest.shape
    launch(
        rounding.round_block_kernel,
        (triton.cdiv(out, ROUNDED_ROWS),),
        rest.device,
        rest,
        factor,
        scales,
        zeros,
        group_of,
        codes,
        errors,
        start,
        out,
        width,
        float(top),
        columns=stop - start,
        COLUMNS=triton.next_power_of_2(stop - start),
        ROWS=ROUNDED_ROWS,
        num_warps=4,
    )


def descend_block(
    slope: Tensor,
    gram: Tensor,
    scales: Tensor,
    zeros: Tensor,
    codes: Tensor,
    new_codes: Tensor,
    moves: Tensor,
    start: int,
    stop: int,
    top: int,
) -> None:
    """As `awq.core.refinement._descend_block`: slope, codes [in, out]; scales, zeros [groups, out];
    all contiguous."""
    width, out = slope.shape
    launch(
        rounding.descend_block_kernel,
        (triton.cdiv(out, ROUNDED_ROWS),),
        slope.device,
        slope,
        gram,
        scales,
        zeros,
        codes,
        new_codes,
        moves,
        start,
        out,
        width,
        width // len(scales),
        float(top),
        columns=stop - start,
        COLUMNS=triton.next_power_of_2(stop - start),
        ROWS=ROUNDED_ROWS,
        num_warps=4,
    )
