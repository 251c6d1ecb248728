"""Triton kernels for few tokens and small weights: a program holds all its weights in registers
before the activations are there.

Where a weight is a few megabytes, a product is latency: the kernel in `matmul` loads in steps, and
programs that share the inputs of a tile meet at the end. Here a program takes few rows of the
weight with all their inputs and asks for all of them at once, before it waits for the kernel in
front. What is left after the wait is to fetch the activations, to multiply, and to add up within
the program. The blocks of 128 inputs are the batch of one product of three axes, so that warps
share the inputs; TP, a power of two from the number of blocks up, is that axis.

A second product of experts knows them before the first one has ended, for the first waited for
them, so it holds its weights before the wait, too. The first product learns its experts at the
wait, and then asks for all its weights at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from awq.kernels.triton.experts import _gated, _rows_of_tile
from awq.kernels.triton.experts import _in_range as in_range
from awq.kernels.triton.experts import _store as store_rows
from awq.kernels.triton.matmul import _grid, _planes
from awq.kernels.triton.matmul import _store as store_product


@triton.jit
def _held(qweight, grid, row, t, i, K: tl.constexpr, GROUP: tl.constexpr, NP: tl.constexpr):
    """(words [TP, rows, 32], scales and zeros [TP, rows]) of all blocks of 128 inputs."""
    STEPS: tl.constexpr = (K + 128 - 1) // 128
    block = t
    if STEPS & (STEPS - 1) != 0:
        block = tl.minimum(t, STEPS - 1)  # beyond the last x is 0

    rows = row[None, :, None] * 32
    place = rows + i[None, None, :]
    start = block[:, None, None] * (NP * 32)
    words = tl.load(qweight + start + place)
    group = t * 0
    if GROUP < K:
        group = block // (GROUP // 128)

    corner = group[:, None] * NP
    scales = tl.load(grid + corner + row[None, :])

    return words, scales


@triton.jit
def _inputs(x, m, k, M, K: tl.constexpr, TAIL: tl.constexpr):
    """x at inputs k [TP, 32] of tokens m, [TP, 32, tokens]; zeros outside."""
    mask = (m[None, None, :] < M) & (k[:, :, None] >= 0)
    if TAIL:
        mask = mask & (k[:, :, None] < K)
    return tl.load(x + m[None, None, :].to(tl.int64) * K + k[:, :, None], mask=mask, other=0.0)


@triton.jit
def _sum(
    x,
    m,
    M,
    words,
    grid_words,
    t,
    i,
    K: tl.constexpr,
    TP: tl.constexpr,
    ASM: tl.constexpr,
    BF16: tl.constexpr,
):
    """float32 [rows, tokens] of what is held times rows m of x [M, K]."""
    TAIL: tl.constexpr = TP * 128 != K
    zero, scale = _grid(grid_words)
    k = t[:, None] * 128 + i[None, :]
    x0 = _inputs(x, m, k, M, K, TAIL)
    x1 = _inputs(x, m, k + 32, M, K, TAIL)
    x2 = _inputs(x, m, k + 64, M, K, TAIL)
    x3 = _inputs(x, m, k + 96, M, K, TAIL)
    p0, p1, p2, p3 = _planes(words, zero[:, :, None], ASM, BF16)
    part = tl.dot(p0, x0)
    part = tl.dot(p1, x1, part)
    part = tl.dot(p2, x2, part)
    part = tl.dot(p3, x3, part)

    return tl.sum(part * scale.to(tl.float32)[:, :, None], 0)


@triton.jit(do_not_specialize=["M"])
def held_kernel(
    x,
    qweight,
    grid,
    bias,
    y,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    NP: tl.constexpr,
    TP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASM: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    PDL: tl.constexpr,
):
    """y [M, N] = x [M, K] · weightᵀ + bias for M ≤ BM. GROUP: a multiple of 128, or K. Grid:
    (⌈N/BN⌉,). GATED, INTERLEAVE: as of `matmul_kernel`."""
    BF16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    tile = tl.program_id(0)
    n = tile * BN + tl.arange(0, BN)
    row = n
    if NP % BN != 0:
        row = tl.minimum(n, NP - 1)

    m = tl.arange(0, BM)
    t = tl.arange(0, TP)
    i = tl.arange(0, 32)
    if PDL:
        gdc_launch_dependents()

    words, grid_words = _held(qweight, grid, row, t, i, K, GROUP, NP)
    if PDL:
        gdc_wait()

    total = _sum(x, m, M, words, grid_words, t, i, K, TP, ASM, BF16)
    store_product(y, total, bias, tile * BN, n, m, M, N, BM, BN, HAS_BIAS, GATED, INTERLEAVE)


@triton.jit(do_not_specialize=["R", "E"])
def held_expert_kernel(
    x,
    qweight,
    grid,
    bias,
    factors,
    experts,
    y,
    R,
    E,
    TOP: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    NP: tl.constexpr,
    TP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    GATED: tl.constexpr,
    ALTERNATING: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    BEFORE: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """y [R, N] = factor · (x [R / TOP, K] · weightᵀ + bias), row by row of each row's expert; no
    two rows have one expert, and a row of an expert that there is not is NaN. Grid: (R, ⌈N/BN⌉).

    BEFORE: the kernel in front waited for what made `experts`, so they are read before the wait.
    The rest: as of `expert_kernel`.
    """
    BF16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    BLOCKS: tl.constexpr = (K + 128 - 1) // 128
    r = tl.program_id(0)
    tile = tl.program_id(1)
    n = tile * BN + tl.arange(0, BN)
    row = _rows_of_tile(tile, N, NP, BN, GATED, INTERLEAVE, ALTERNATING)
    t = tl.arange(0, TP)
    i = tl.arange(0, 32)
    rows = tl.where(tl.arange(0, BM) == 0, r, R)

    if PDL:
        if BEFORE:
            gdc_launch_dependents()
        else:
            gdc_wait()
            # not before: the next kernel reads `experts` ahead of its own wait
            gdc_launch_dependents()

    number = tl.load(experts + r, cache_modifier=".cg").to(tl.int64)
    known = (number >= 0) & (number < E)
    expert = in_range(number, E)
    words, grid_words = _held(
        qweight + expert * (BLOCKS * NP * 32),
        grid + expert * (GROUPS * NP),
        row,
        t,
        i,
        K,
        GROUP,
        NP,
    )
    if PDL and BEFORE:
        gdc_wait()

    total = _sum(x, rows // TOP, R // TOP, words, grid_words, t, i, K, TP, ASM, BF16)
    total = tl.where(known, total, float("nan"))
    if HAS_BIAS:
        total += tl.load(bias + expert * N + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    if GATED == "":
        store_rows(y, total, factors, rows, n, R, N, HAS_FACTORS)
    else:
        value = _gated(total, y.dtype.element_ty, BM, BN, GATED, INTERLEAVE)
        channel = tile * (BN // 2) + tl.arange(0, BN // 2)
        store_rows(y, value, factors, rows, channel, R, N // 2, HAS_FACTORS)
