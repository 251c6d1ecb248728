"""The searches of `awq.core.ranges` and `scales` as Triton kernels: a weight is read once and its
candidates stay on the chip.

With plain operators each candidate is written and read again by every elementwise pass, and that is
most of the time.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from awq.kernels.triton.rounding import nearest_integer


class Tile(NamedTuple):
    """Sizes of `row_losses_kernel`: rows, columns and depth of a tile; warps and pipeline
    stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@triton.jit
def _divided(x, y, inverse):
    """x / y, correctly rounded: inverse is 1 / y correctly rounded, and one Newton step mends its
    product with x."""
    q = x * inverse
    return tl.fma(tl.fma(-q, y, x), inverse, q)


@triton.jit
def _stored(scale):
    """`weight.storable_scale`: as float16 holds it."""
    return (
        tl.minimum(tl.maximum(scale, 5.9604644775390625e-08), 65504.0).to(tl.float16).to(tl.float32)
    )


@triton.jit
def _scale_and_zero(low, high, top, steps, per_step, ZERO_POINT: tl.constexpr):
    """`weight.scale_and_zero`, and 1 / scale; steps: from the lowest to the highest code (from the
    middle, without a zero point), per_step: 1 / steps."""
    if ZERO_POINT:
        scale = _stored(_divided(tl.maximum(high - low, 1e-5), steps, per_step))
        inverse = tl.div_rn(scale * 0.0 + 1.0, scale)
        zero = tl.minimum(tl.maximum(nearest_integer(_divided(-low, scale, inverse)), 0.0), top)
    else:
        scale = _stored(_divided(tl.maximum(high, 1e-5), steps, per_step))
        inverse = tl.div_rn(scale * 0.0 + 1.0, scale)
        zero = scale * 0.0 + steps + 1.0
    return scale, zero, inverse


@triton.jit
def _represented(w, scale, zero, inverse, top):
    """`weight.fake_quantize`: nearest representable values of w [ROWS, SIZE] under scale and zero
    [ROWS]."""
    steps = nearest_integer(_divided(w, scale[:, None], inverse[:, None]))
    code = tl.minimum(tl.maximum(steps + zero[:, None], 0.0), top)
    return (code - zero[:, None]) * scale[:, None]


@triton.jit
def _range(w, ZERO_POINT: tl.constexpr):
    """`weight.group_range` of w [ROWS, SIZE]; places beyond the group hold zeros, which every range
    contains."""
    if ZERO_POINT:
        low = tl.minimum(tl.min(w, 1), 0.0)
        high = tl.maximum(tl.max(w, 1), 0.0)
    else:
        high = tl.max(tl.abs(w), 1)
        low = -high
    return low, high


@triton.jit
def best_range_kernel(
    weight,
    blocks,
    shrink,
    best,
    out,
    width,
    groups,
    top,
    steps,
    per_step,
    size,
    STEPS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    ZERO_POINT: tl.constexpr,
):
    group = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)
    mask = (row < out)[:, None] & (column < size)[None, :]
    w = tl.load(
        weight + row.to(tl.int64)[:, None] * width + (group * size + column)[None, :],
        mask=mask,
        other=0.0,
    )
    inner = (column < size)[:, None] & (column < size)[None, :]
    g = tl.load(
        blocks + group.to(tl.int64) * size * size + column[:, None] * size + column[None, :],
        mask=inner,
        other=0.0,
    )
    g = tl.trans(g)  # symmetric; the matrix units want the summed axis contiguous
    low, high = _range(w, ZERO_POINT)
    best_loss = tl.full([ROWS], float("inf"), tl.float32)
    found = tl.zeros([ROWS], tl.int32)

    for k in range(STEPS * STEPS if ZERO_POINT else STEPS):
        high_factor = tl.load(shrink + (k // STEPS if ZERO_POINT else k))
        low_factor = tl.load(shrink + k % STEPS)
        scale, zero, inverse = _scale_and_zero(
            low * low_factor, high * high_factor, top, steps, per_step, ZERO_POINT
        )
        delta = _represented(w, scale, zero, inverse, top) - w
        loss = tl.sum(tl.dot(delta, g, input_precision="tf32") * delta, 1)
        better = loss < best_loss  # the first of equals stays
        best_loss = tl.where(better, loss, best_loss)
        found = tl.where(better, k, found)

    tl.store(best + row.to(tl.int64) * groups + group, found.to(tl.uint8), mask=row < out)


def range_tile(capability: tuple[int, int]) -> tuple[int, int]:
    """Rows and warps of a program of `best_range_kernel`; 32 rows and a block of G fit every GPU's
    shared memory."""
    return (64, 8) if capability == (9, 0) else (32, 4)


@triton.jit
def scaled_delta_kernel(
    weight,
    scales,
    delta,
    out,
    width,
    top,
    steps,
    per_step,
    size,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    ZERO_POINT: tl.constexpr,
):
    group = tl.program_id(1)
    candidate = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)
    mask = (row < out)[:, None] & (column < size)[None, :]
    place = row.to(tl.int64)[:, None] * width + (group * size + column)[None, :]
    w = tl.load(weight + place, mask=mask, other=0.0)
    s = tl.load(scales + candidate * width + group * size + column, mask=column < size, other=1.0)[
        None, :
    ]
    scaled = w * s
    low, high = _range(scaled, ZERO_POINT)
    scale, zero, inverse = _scale_and_zero(low, high, top, steps, per_step, ZERO_POINT)
    value = tl.div_rn(_represented(scaled, scale, zero, inverse, top), s + tl.zeros_like(w)) - w
    start = candidate.to(tl.int64) * out * width
    tl.store(delta + start + place, value.to(delta.dtype.element_ty), mask=mask)


@triton.jit
def row_losses_kernel(
    delta,
    upper,
    partial,
    rows,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    # Tiles of TOGETHER rows of tiles run side by side, and share the pieces of G that they read.
    tiles_r = tl.cdiv(rows, ROWS)
    tiles_c = tl.cdiv(width, COLUMNS)
    band = tl.program_id(0) // (TOGETHER * tiles_c)
    within = tl.program_id(0) % (TOGETHER * tiles_c)
    height = tl.minimum(tiles_r - band * TOGETHER, TOGETHER)
    tile_r = band * TOGETHER + within % height

    # the last column of tiles sums over most, and starts first
    tile_c = tiles_c - 1 - within // height
    row = tile_r * ROWS + tl.arange(0, ROWS)
    column = tile_c * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    inside = row < rows
    left = delta + row.to(tl.int64)[:, None] * width
    right = upper + column[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)

    for start in range(0, tl.minimum((tile_c + 1) * COLUMNS, width), DEPTH):
        k = start + depth
        a = tl.load(left + k[None, :], mask=inside[:, None] & (k < width)[None, :], other=0.0)
        b = tl.load(
            right + k.to(tl.int64)[:, None] * width,
            mask=(k < width)[:, None] & (column < width)[None, :],
            other=0.0,
        )
        total = tl.dot(a, b, total)

    own = tl.load(
        left + column[None, :], mask=inside[:, None] & (column < width)[None, :], other=0.0
    )
    tl.store(
        partial + tile_c.to(tl.int64) * rows + row,
        tl.sum(total * own.to(tl.float32), 1),
        mask=inside,
    )


def tile_for(capability: tuple[int, int]) -> Tile:
    """The tile of `row_losses_kernel` for a compute capability; large shared memories take three
    stages."""
    if capability == (9, 0):
        return Tile(128, 256, 64, 8, 3)
    return Tile(128, 128, 64, 8, 3 if capability in ((8, 0), (10, 0)) else 2)
