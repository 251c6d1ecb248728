"""Triton kernels of a mixture of experts: each row of x goes through the weight of its own expert.

A row is one pair of a token and one of its experts: row r belongs to token r // top_k. A program
computes a block of at most BM rows of one expert, whose tile of weights it unpacks once. Which rows
make a block is found

- by the programs themselves when rows are few (`ROWS`): a program is started per row, reads all
  rows' experts, and goes on if its row is the first, or the BM-th after it, of its expert's.
  Nothing is sorted, and nothing is started for idle experts.
- by `route_kernel` when they are many: a stable counting sort by expert into blocks of BM, padded.

With one token every row is an expert of its own, and there is nothing to find.

Both are deterministic, and neither asks the host how many rows an expert has: a CUDA graph may hold
them. Blocks are the fastest axis of the grid, so those of one expert read their common tile of
weights while it is in the L2 cache.

The first product of a gated expert may end in the activation (GATED). A tile then holds channels of
the gate and the same ones of up, 16 of each in turn, whichever way the weight holds them: rows of
a planar weight lie 64 bytes apart, so two runs of rows are read as fast as one.

The second product knows its experts before the first one has ended, for the first waited for them.
With AHEAD it fetches its first weights into the L2 cache meanwhile. That is a hint and no more: the
experts are read again after the wait.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from awq.kernels.triton.activations import activation
from awq.kernels.triton.matmul import sum_of_slice


@triton.jit
def _rows_of_first(experts, first, R, ROWS: tl.constexpr, BM: tl.constexpr):
    """(expert of row `first`, that row's rank among its expert's, the rows of that rank and the BM
    − 1 next; R for none)."""
    r = tl.arange(0, ROWS)
    expert = tl.load(experts + first)
    others = tl.load(experts + r, mask=r < R, other=0)
    mine = ((others == expert) & (r < R)).to(tl.int32)
    rank = tl.cumsum(mine, 0) - 1

    before = tl.where(r < first, mine, 0)
    begin = tl.sum(before, 0)

    wanted = begin + tl.arange(0, BM)[None, :]
    hit = (mine[:, None] > 0) & (rank[:, None] == wanted)
    rows = tl.sum(tl.where(hit, r[:, None] - R, 0), 0)

    return expert, begin, R + rows


@triton.jit
def _in_range(number, E):
    """A number of an expert as one that there is: what is read stays inside of the weights."""
    return tl.minimum(tl.maximum(number, 0), E - 1)


@triton.jit
def _experts_of(experts, r, R, E, BINS: tl.constexpr):
    """The experts of rows r, `_in_range`; BINS − 1 behind the last row."""
    found = _in_range(tl.load(experts + r, mask=r < R, other=0), E).to(tl.int32)
    return tl.where(r < R, found, BINS - 1)


@triton.jit
def _fetch_ahead(
    experts,
    qweight,
    block,
    tile,
    slice,
    E,
    K: tl.constexpr,
    NP: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Asks for the first AHEAD steps of this program's weights, if `experts` says which already."""
    STEPS: tl.constexpr = (K + 128 - 1) // 128
    PER: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    guess = _in_range(tl.load(experts + block, cache_modifier=".cg").to(tl.int64), E)
    words = qweight.to(tl.pointer_type(tl.int8)) + guess * (STEPS * NP * 64)
    steps = tl.minimum(slice * PER + tl.arange(0, AHEAD), STEPS - 1).to(tl.int64)
    lines = tl.minimum(tile * BN * 64 + tl.arange(0, BN // 2) * 128, NP * 64 - 128)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [words + steps[:, None] * (NP * 64) + lines[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _gated_rows(
    tile,
    j,
    N: tl.constexpr,
    NP: tl.constexpr,
    BN: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    ALTERNATING: tl.constexpr,
):
    """Rows of the weight for places j = 0 … BN − 1 of a tile: INTERLEAVE channels of the gate and
    as many of up in turn."""
    HALF: tl.constexpr = N // 2
    within = j % (2 * INTERLEAVE)
    channel = tile * (BN // 2) + (j // (2 * INTERLEAVE)) * INTERLEAVE + within % INTERLEAVE
    up = (within >= INTERLEAVE).to(tl.int32)

    if ALTERNATING:
        row = 2 * channel + up
    else:
        row = channel + up * HALF

    if HALF % (BN // 2) != 0:
        row = tl.minimum(row, NP - 1)
    elif not ALTERNATING and HALF % INTERLEAVE == 0:
        row = tl.max_contiguous(tl.multiple_of(row, INTERLEAVE), INTERLEAVE)

    return row


@triton.jit
def _rows_of_tile(
    tile,
    N: tl.constexpr,
    NP: tl.constexpr,
    BN: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    ALTERNATING: tl.constexpr,
):
    """Rows [BN] of the weight that a tile reads; those behind the last one read the last."""
    row = tile * BN + tl.arange(0, BN)
    if GATED != "":
        row = _gated_rows(tile, tl.arange(0, BN), N, NP, BN, INTERLEAVE, ALTERNATING)
    elif NP % BN != 0:
        row = tl.minimum(row, NP - 1)
    return row


@triton.jit
def _gated(
    total,
    dtype: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    NAME: tl.constexpr,
    INTERLEAVE: tl.constexpr,
):
    """act(gate) · up [BN/2, BM] of a tile [BN, BM] with both in turn, rounded where two kernels
    would have stored."""
    halves = tl.permute(
        total.to(dtype).to(tl.float32).reshape(BN // (2 * INTERLEAVE), 2, INTERLEAVE, BM),
        (0, 2, 3, 1),
    )
    gate, up = tl.split(halves)
    return (activation(gate, NAME).to(dtype).to(tl.float32) * up).reshape(BN // 2, BM)


@triton.jit
def _store(y, value, factors, rows, n, R, N: tl.constexpr, HAS_FACTORS: tl.constexpr):
    """Outputs n of rows of y [R, N] = factor · value [n, rows]."""
    inside = rows[None, :] < R
    if HAS_FACTORS:
        value *= tl.load(factors + rows, mask=rows < R, other=0.0).to(tl.float32)[None, :]
    where = rows[None, :].to(tl.int64) * N + n[:, None]
    tl.store(y + where, value.to(y.dtype.element_ty), mask=inside & (n[:, None] < N))


@triton.jit(do_not_specialize=["R", "E"])
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
    E,
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
    GATED: tl.constexpr,
    ALTERNATING: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    AHEAD: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """y [R, N] = factor · (x [R / TOP, K] · weightᵀ + bias), row by row of each row's expert. Grid:
    (blocks, ⌈N/BN⌉, SPLIT).

    experts int [R], values 0 … E − 1: a row of any other is NaN. blocks = R when ROWS is given: 1
    for rows of which no two have one expert, else a power of two ≥ R and 16. Without, order int32
    [blocks · BM] and owner int32 [blocks] of `route_kernel`. TOP: rows that share a row of x (1:
    none does). factors [R], any float dtype. GROUPS: groups of K. partial float32 [SPLIT, R,
    tiles · BN] and arrived int32 [blocks · tiles] are used when SPLIT > 1.
    GATED: an activation's name, or "". With one, y [R, N/2] = factor · act(gate) · up; ALTERNATING:
    rows of gate and up take turns, instead of all of one and then all of the other.
    """
    BF16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    BLOCKS: tl.constexpr = (K + 128 - 1) // 128
    block = tl.program_id(0)
    tile = tl.program_id(1)
    slice = tl.program_id(2)
    n = tile * BN + tl.arange(0, BN)
    row = _rows_of_tile(tile, N, NP, BN, GATED, INTERLEAVE, ALTERNATING)
    i = tl.arange(0, 32)

    if PDL:
        if AHEAD > 0:
            _fetch_ahead(experts, qweight, block, tile, slice, E, K, NP, BN, SPLIT, AHEAD)
        if GATED == "":
            gdc_launch_dependents()
        gdc_wait()

        if GATED != "":
            # not before: what the next kernel fetches ahead is then known
            gdc_launch_dependents()

    if ROWS == 1:
        expert = tl.load(experts + block)
        rows = tl.where(tl.arange(0, BM) == 0, block, R)
    elif ROWS > 0:
        expert, begin, rows = _rows_of_first(experts, block, R, ROWS, BM)
        if begin % BM != 0:
            return
    else:
        expert = tl.load(owner + block)
        if expert < 0:
            return
        rows = tl.load(order + block * BM + tl.arange(0, BM))

    known = (expert >= 0) & (expert < E)
    expert = _in_range(expert, E)
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

    last = True
    if SPLIT > 1:
        WIDE: tl.constexpr = (N + BN - 1) // BN * BN
        inside = rows[None, :] < R
        where = rows[None, :].to(tl.int64) * WIDE + n[:, None]
        plane = R.to(tl.int64) * WIDE
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

        if ROWS > 0:
            acc = tl.where(known, acc, float("nan"))
        else:
            # a block of the sort's is of an expert that there is, but not all of its rows need be
            number = tl.load(experts + rows, mask=rows < R, other=0)
            acc = tl.where(((number >= 0) & (number < E))[None, :], acc, float("nan"))

        if HAS_BIAS:
            acc += tl.load(bias + expert.to(tl.int64) * N + row, mask=row < N, other=0.0).to(
                tl.float32
            )[:, None]

        if GATED == "":
            _store(y, acc, factors, rows, n, R, N, HAS_FACTORS)
        else:
            value = _gated(acc, y.dtype.element_ty, BM, BN, GATED, INTERLEAVE)
            channel = tile * (BN // 2) + tl.arange(0, BN // 2)
            _store(y, value, factors, rows, channel, R, N // 2, HAS_FACTORS)


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

    experts int [R], `_in_range` here. order int32 [BLOCKS · BM]: rows, R for padding. owner int32
    [BLOCKS]: a block's expert; the last program writes −1 to the blocks that are left over. BINS: a
    power of two > E.
    """
    me = tl.program_id(0)
    r = tl.arange(0, CHUNK)
    bins = tl.arange(0, BINS)

    if PDL:
        gdc_launch_dependents()
        gdc_wait()

    counts = tl.zeros((BINS,), tl.int32)
    start = 0
    while start < R:
        counts += tl.histogram(_experts_of(experts, start + r, R, E, BINS), BINS)
        start += CHUNK

    blocks = tl.where(bins < E, (counts + BM - 1) // BM, 0)
    first = tl.sum(tl.where(bins < me, blocks, 0), 0)
    end = first + tl.sum(tl.where(bins == me, blocks, 0), 0)

    if me == E:
        end = BLOCKS
        me = -1

    start = 0
    while start < BLOCKS:
        tl.store(owner + start + r, me, mask=(start + r >= first) & (start + r < end))
        start += CHUNK

    if me >= 0:
        at = first * BM
        start = 0
        while start < R:
            mine = _experts_of(experts, start + r, R, E, BINS) == me
            tl.store(order + at + tl.cumsum(mine.to(tl.int32), 0) - 1, start + r, mask=mine)
            at += tl.sum(mine.to(tl.int32), 0)
            start += CHUNK

        rest = at + tl.arange(0, BM)
        tl.store(order + rest, R, mask=rest < end * BM)
