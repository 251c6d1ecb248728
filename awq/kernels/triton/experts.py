"""Triton kernels of a mixture of experts: each row of x goes through the weight of its own expert.

A row is one pair of a token and one of its experts: row r belongs to token r // top_k. A program
computes a block of at most BM rows of one expert, whose tile of weights it unpacks once. Which rows
make a block is found

- by the programs themselves when rows are few (`ROWS`): a program is started per row, reads all
  rows' experts, and goes on if its row is the first, or the BM-th after it, of its expert's.
  Nothing is sorted, and nothing is started for idle experts.
- by `route_kernel` when they are many: a stable counting sort by expert into blocks of BM, padded.

Both are deterministic, and neither asks the host how many rows an expert has: a CUDA graph may hold
them. Blocks are the fastest axis of the grid, so those of one expert read their common tile of
weights while it is in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from awq.kernels.triton.matmul import sum_of_slice


@triton.jit
def _rows_of_first(experts, first, R, ROWS: tl.constexpr, BM: tl.constexpr):
    """(expert of row `first`, that row's rank among its expert's, the rows of that rank and the BM
    − 1 next; R for none)."""
    r = tl.arange(0, ROWS)
    expert = tl.load(experts + first).to(tl.int32)
    mine = (tl.load(experts + r, mask=r < R, other=-1).to(tl.int32) == expert).to(tl.int32)
    rank = tl.cumsum(mine, 0) - 1
    begin = tl.sum(tl.where(r < first, mine, 0), 0)
    hit = (mine[:, None] > 0) & (rank[:, None] == begin + tl.arange(0, BM)[None, :])
    return expert, begin, R + tl.sum(tl.where(hit, r[:, None] - R, 0), 0)


@triton.jit(do_not_specialize=["R"])
def expert_kernel(
    x,
    qweight,
    grid,
    bias,
    factors,
    experts,
    order,
    owner,
    y,
    partial,
    arrived,
    R,
    TOP: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    NP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALE_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """y [R, N] = factor · (x [R / TOP, K] · weightᵀ + bias), row by row of each row's expert. Grid:
    (blocks, ⌈N/BN⌉, SPLIT).

    experts int [R] with blocks = R when ROWS, a power of two ≥ R and 16, is given; else order int32
    [blocks · BM] and owner int32
    [blocks] of `route_kernel`. TOP: rows that share a row of x (1: none does). factors [R], any
    float dtype. GROUPS: groups of K. partial float32 [SPLIT, R, N] and arrived int32 [blocks ·
    ⌈N/BN⌉] are used when SPLIT > 1.
    """
    BF16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    BLOCKS: tl.constexpr = (K + 128 - 1) // 128
    block, tile, slice = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tile * BN + tl.arange(0, BN)
    row = n
    if NP % BN != 0:
        row = tl.minimum(n, NP - 1)
    i = tl.arange(0, 32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if ROWS > 0:
        expert, begin, rows = _rows_of_first(experts, block, R, ROWS, BM)
        if begin % BM != 0:
            return
    else:
        expert = tl.load(owner + block)
        if expert < 0:
            return
        rows = tl.load(order + block * BM + tl.arange(0, BM))
    words = qweight + expert.to(tl.int64) * (BLOCKS * NP * 32)
    scales = grid + expert.to(tl.int64) * (GROUPS * NP)
    acc = sum_of_slice(
        x,
        rows // TOP,
        R // TOP,
        words,
        scales,
        row,
        slice,
        i,
        K,
        GROUP,
        NP,
        BM,
        BN,
        SPLIT,
        SCALE_WEIGHT,
        ASM,
        BF16,
    )
    inside = (rows[None, :] < R) & (n[:, None] < N)
    where = rows[None, :].to(tl.int64) * N + n[:, None]
    last = True
    if SPLIT > 1:
        plane = R.to(tl.int64) * N
        tl.store(partial + slice * plane + where, acc, mask=inside)
        tl.debug_barrier()  # every thread's sums before the release by one of them
        counter = arrived + block * tl.num_programs(1) + tile
        last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1
    if last:
        if SPLIT > 1:
            acc = tl.zeros((BN, BM), tl.float32)
            for s in tl.static_range(SPLIT):
                acc += tl.load(
                    partial + s * plane + where, mask=inside, other=0.0, cache_modifier=".cg"
                )
            tl.store(counter, 0)
        if HAS_BIAS:
            acc += tl.load(bias + expert.to(tl.int64) * N + n, mask=n < N, other=0.0).to(
                tl.float32
            )[:, None]
        if HAS_FACTORS:
            acc *= tl.load(factors + rows, mask=rows < R, other=0.0).to(tl.float32)[None, :]
        tl.store(y + where, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R", "E", "BLOCKS"])
def route_kernel(
    experts,
    order,
    owner,
    R,
    E,
    BLOCKS,
    BINS: tl.constexpr,
    BM: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows in the order of their experts, each expert's padded to whole blocks of BM. Grid: (E +
    1,), one program per expert.

    experts int [R], values 0 … E − 1. order int32 [BLOCKS · BM]: rows, R for padding. owner int32
    [BLOCKS]: a block's expert; the last program writes −1 to the blocks that are left over. BINS: a
    power of two > E.
    """
    me = tl.program_id(0)
    r, bins = tl.arange(0, CHUNK), tl.arange(0, BINS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    counts = tl.zeros((BINS,), tl.int32)
    start = 0
    while start < R:
        found = tl.load(experts + start + r, mask=start + r < R, other=BINS - 1).to(tl.int32)
        counts += tl.histogram(found, BINS)
        start += CHUNK
    blocks = tl.where(bins < E, (counts + BM - 1) // BM, 0)
    first = tl.sum(tl.where(bins < me, blocks, 0), 0)
    end = first + tl.sum(tl.where(bins == me, blocks, 0), 0)
    if me == E:
        end, me = BLOCKS, -1
    start = 0
    while start < BLOCKS:
        tl.store(owner + start + r, me, mask=(start + r >= first) & (start + r < end))
        start += CHUNK
    if me >= 0:
        at = first * BM
        start = 0
        while start < R:
            mine = (
                tl.load(experts + start + r, mask=start + r < R, other=BINS - 1).to(tl.int32) == me
            )
            tl.store(order + at + tl.cumsum(mine.to(tl.int32), 0) - 1, start + r, mask=mine)
            at += tl.sum(mine.to(tl.int32), 0)
            start += CHUNK
        rest = at + tl.arange(0, BM)
        tl.store(order + rest, R, mask=rest < end * BM)
