"""The sequential steps of `awq.core.rounding` and `refinement` as kernels: a GPU would otherwise
spend its time on launches.

Rows are independent, so a program keeps a tile [columns, rows] of residuals in registers and walks
its columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(values, start, row, column, out, columns: tl.constexpr):
    """Columns start … start + columns of `values` [in, out] for some rows: [COLUMNS, ROWS], zeros
    outside."""
    mask = (column < columns)[:, None] & (row < out)[None, :]
    return tl.load(
        values + (start + column).to(tl.int64)[:, None] * out + row[None, :], mask=mask, other=0.0
    )


@triton.jit
def nearest_integer(x):
    """Half to even, as torch.round: 1.5 · 2**23 added and taken away leaves the integer."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _code(steps, zero, top):
    """The code nearest to zero + steps."""
    return tl.minimum(tl.maximum(nearest_integer(steps) + zero, 0.0), top)


@triton.jit
def round_block_kernel(
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
    top,
    columns: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = row < out
    tile = _tile(rest, start, row, column, out, columns)

    for c in range(columns):
        w = tl.sum(tl.where(column[:, None] == c, tile, 0.0), axis=0)
        group = tl.load(group_of + start + c)
        s = tl.load(scales + group * out + row, mask=inside, other=1.0)
        z = tl.load(zeros + group * out + row, mask=inside, other=0.0)
        code = _code(tl.div_rn(w, s), z, top)
        tl.store(codes + (start + c).to(tl.int64) * out + row, code.to(tl.uint8), mask=inside)
        u = tl.load(
            factor + (start + c).to(tl.int64) * width + start + column,
            mask=column < columns,
            other=0.0,
        )
        pivot = tl.load(factor + (start + c).to(tl.int64) * width + start + c)
        error = (w - (code - z) * s) / pivot
        tl.store(errors + c * out + row, error, mask=inside)
        tile = tile - tl.where(column > c, u, 0.0)[:, None] * error[None, :]


@triton.jit
def descend_block_kernel(
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
    group_size,
    top,
    columns: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = row < out
    tile = _tile(slope, start, row, column, out, columns)

    for c in range(columns):
        p = tl.sum(tl.where(column[:, None] == c, tile, 0.0), axis=0)
        group = (start + c) // group_size
        s = tl.load(scales + group * out + row, mask=inside, other=1.0)
        z = tl.load(zeros + group * out + row, mask=inside, other=0.0)
        code = tl.load(codes + (start + c).to(tl.int64) * out + row, mask=inside, other=0).to(
            tl.float32
        )
        g = tl.load(
            gram + (start + c).to(tl.int64) * width + start + column,
            mask=column < columns,
            other=0.0,
        )
        pivot = tl.load(gram + (start + c).to(tl.int64) * width + start + c)
        new = _code(code - z - tl.div_rn(p, s * pivot), z, top)
        move = (new - code) * s

        # Into another tensor: threads of several warps hold the same row, and one may store before
        # another has loaded.
        tl.store(new_codes + (start + c).to(tl.int64) * out + row, new.to(tl.uint8), mask=inside)
        tl.store(moves + c * out + row, move, mask=inside)
        tile = tile + g[:, None] * move[None, :]
