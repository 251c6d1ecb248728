"""Gluon kernels for one token and small weights: what memory holds is what tensor cores take.

Where a weight is a few megabytes, a product is latency: the kernels in `matmul` load in steps, and
programs that share the inputs of a tile meet at the end. Here a program takes few rows of the
weight with all their inputs and asks for all of them at once, before it waits for the kernel in
front where the weight is known by then.

Triton brings loaded words into the order of tensor cores through shared memory: every program would
store and read its weights once more, between barriers. A planar row of 128 inputs is 64 bytes, and
which of its words meet in one multiplication is free as long as the inputs follow. With words 8t …
8t + 7 in lane t of four, 16 bytes of a row are the left operand of two multiplications in each
plane, so they are loaded where they are used. Gluon is Triton with layouts said outright. The
blocks of 128 inputs are divided among warps, which meet once, for the sums.

All eight columns of the right operand hold the one token, and so all columns of the result are
equal. It comes through shared memory, read plane by plane: four planes of it in registers would
leave room for fewer programs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from awq.kernels.triton.activations import activation
from awq.kernels.triton.operands import (
    inputs_at,
    left_of,
    rows_of,
    scale_of,
    sum_of,
    sums_of,
    vector_of,
    weights_of,
)


@gluon.jit
def _store(
    y,
    total,
    tile,
    bias,
    row,
    N: gl.constexpr,
    BN: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr,
    WARPS: gl.constexpr,
):
    """y at the outputs of a tile = total [BN] + bias, or with an activation act(gate) · up."""
    dtype: gl.constexpr = y.dtype.element_ty
    PAIRS: gl.constexpr = vector_of(WARPS, 2)
    if HAS_BIAS:
        total += gl.load(bias + row, mask=row < N, other=0.0).to(gl.float32)
    if GATED == "":
        n = tile * BN + gl.arange(0, BN, layout=PAIRS)
        gl.store(y + n, total.to(dtype), mask=n < N)
    else:
        gate, up = gl.split(total.to(dtype).to(gl.float32).reshape(BN // 2, 2))
        value = activation(gate, GATED).to(dtype).to(gl.float32) * up
        SINGLE: gl.constexpr = vector_of(WARPS, 1)
        value = gl.convert_layout(value.to(dtype), SINGLE)
        n = tile * (BN // 2) + gl.arange(0, BN // 2, layout=SINGLE)
        gl.store(y + n, value, mask=n < N // 2)


@gluon.jit
def direct_kernel(
    x,
    qweight,
    grid,
    bias,
    y,
    N: gl.constexpr,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    NP: gl.constexpr,
    TP: gl.constexpr,
    BN: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr,
    RUN: gl.constexpr,
    WARPS: gl.constexpr,
    PDL: gl.constexpr,
):
    """y [N] = x [K] · weightᵀ + bias. GROUP: a multiple of 128, or K. TP: a power of two from the
    blocks of 128 inputs up, at least WARPS. Grid: (⌈N/BN⌉,).

    GATED: an activation's name, or "". With one, y [N/2] = act(gate) · up of a weight whose rows
    are RUN of the gate and RUN of up in turn; 0: all of one and then all of the other.
    """
    tile = gl.program_id(0)
    if PDL:
        gdc_launch_dependents()
    words, grid_words, grid_sum = weights_of(
        qweight, grid, tile, N, K, GROUP, NP, TP, BN, GATED, RUN, WARPS
    )
    if PDL:
        gdc_wait()
    inputs = inputs_at(x, K, TP, WARPS)
    total = sum_of(inputs, words, grid_words, scale_of(grid_sum), TP, BN, WARPS)
    j = gl.arange(0, BN, layout=vector_of(WARPS, 2))
    row = rows_of(j, tile, N, NP, BN, GATED, RUN)
    _store(y, total, tile, bias, row, N, BN, HAS_BIAS, GATED, WARPS)


@gluon.jit
def _start(BEFORE: gl.constexpr, PDL: gl.constexpr):
    """What a kernel of experts does before it reads `experts`; see `direct_expert_kernel`."""
    if PDL:
        if BEFORE:
            gdc_launch_dependents()
        else:
            gdc_wait()
            # not before: the next kernel reads `experts` ahead of its own wait
            gdc_launch_dependents()


@gluon.jit(do_not_specialize=["R", "E"])
def direct_expert_kernel(
    x,
    qweight,
    grid,
    bias,
    factors,
    experts,
    y,
    R,
    E,
    TOP: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    GROUPS: gl.constexpr,
    NP: gl.constexpr,
    TP: gl.constexpr,
    BN: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_FACTORS: gl.constexpr,
    GATED: gl.constexpr,
    RUN: gl.constexpr,
    BEFORE: gl.constexpr,
    WARPS: gl.constexpr,
    PDL: gl.constexpr,
):
    """y [R, N] = factor · (x [R / TOP, K] · weightᵀ + bias), row by row of each row's expert, for
    the experts of one token; a row of an expert that there is not is NaN. Grid: (R, ⌈N/BN⌉).

    BEFORE: the kernel in front waited for what made `experts`, so they are read before the wait.
    The rest: as of `direct_kernel`.
    """
    STEPS: gl.constexpr = (K + 127) // 128
    r, tile = gl.program_id(0), gl.program_id(1)
    _start(BEFORE, PDL)
    number = gl.load(experts + r, cache_modifier=".cg").to(gl.int64)
    known = (number >= 0) & (number < E)
    expert = gl.minimum(gl.maximum(number, 0), E - 1)
    words, grid_words, grid_sum = weights_of(
        qweight + expert * (STEPS * NP * 32),
        grid + expert * (GROUPS * NP),
        tile,
        N,
        K,
        GROUP,
        NP,
        TP,
        BN,
        GATED,
        RUN,
        WARPS,
    )
    if PDL and BEFORE:
        gdc_wait()
    token = x + (r // TOP).to(gl.int64) * K
    inputs = inputs_at(token, K, TP, WARPS)
    total = sum_of(inputs, words, grid_words, scale_of(grid_sum), TP, BN, WARPS)
    total = gl.where(known, total, float("nan"))
    j = gl.arange(0, BN, layout=vector_of(WARPS, 2))
    row = rows_of(j, tile, N, NP, BN, GATED, RUN)
    OUT: gl.constexpr = N if GATED == "" else N // 2
    result = y + r.to(gl.int64) * OUT
    if HAS_FACTORS:
        if HAS_BIAS:
            total += gl.load(bias + expert * N + row, mask=row < N, other=0.0).to(gl.float32)
        total *= gl.load(factors + r).to(gl.float32)
        _store(result, total, tile, bias, row, N, BN, False, GATED, WARPS)
    else:
        _store(result, total, tile, bias + expert * N, row, N, BN, HAS_BIAS, GATED, WARPS)


@gluon.jit
def _part_of(x, t, E, experts, BLOCKS: gl.constexpr):
    """(number of the expert of blocks t, the same in range, block of its inputs)."""
    number = gl.load(experts + t // BLOCKS, cache_modifier=".cg").to(gl.int64)
    return number, gl.minimum(gl.maximum(number, 0), E - 1), t % BLOCKS


@gluon.jit(do_not_specialize=["E"])
def direct_expert_sum_kernel(
    x,
    qweight,
    grid,
    bias,
    factors,
    experts,
    y,
    E,
    TOP: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    GROUPS: gl.constexpr,
    NP: gl.constexpr,
    TP: gl.constexpr,
    BN: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BEFORE: gl.constexpr,
    WARPS: gl.constexpr,
    PDL: gl.constexpr,
):
    """y [N] = Σ factor · (x · weightᵀ + bias) over the experts [TOP] of one token, x [TOP, K]; NaN
    with an expert that there is not. A program holds its rows of all of them, as if their inputs
    were one long row; TP: a power of two from their blocks of 128 up. Grid: (⌈N/BN⌉,).

    BEFORE: as of `direct_expert_kernel`.
    """
    BLOCKS: gl.constexpr = K // 128
    SUMS: gl.constexpr = sums_of(WARPS)
    LEFT: gl.constexpr = left_of(WARPS)
    LAST: gl.constexpr = TOP * BLOCKS - 1
    WIDE: gl.constexpr = TP if GROUP >= K else GROUP // 128
    tile = gl.program_id(0)
    _start(BEFORE, PDL)
    t = gl.minimum(gl.arange(0, TP, layout=gl.SliceLayout(1, gl.SliceLayout(2, LEFT))), LAST)
    j = gl.arange(0, BN, layout=gl.SliceLayout(0, gl.SliceLayout(2, LEFT)))
    i = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, LEFT)))
    row = gl.minimum(tile * BN + j, NP - 1)
    _, expert, block = _part_of(x, t, E, experts, BLOCKS)
    first = expert * (BLOCKS * NP * 32) + block * (NP * 32)
    place = gl.expand_dims(gl.expand_dims(row, 0), 2) * 32
    start = gl.expand_dims(gl.expand_dims(first, 1), 2)
    words = gl.load(qweight + start + (place + gl.expand_dims(gl.expand_dims(i, 0), 1)))
    corner = gl.expand_dims(expert * (GROUPS * NP) + (block // WIDE) * NP, 1)
    grid_words = gl.load(grid + corner + gl.expand_dims(row, 0))
    t_sum = gl.arange(0, TP, layout=gl.SliceLayout(1, gl.SliceLayout(2, SUMS)))
    t_in = gl.minimum(t_sum, LAST)
    j_sum = gl.arange(0, BN, layout=gl.SliceLayout(0, gl.SliceLayout(2, SUMS)))
    row_sum = gl.minimum(tile * BN + j_sum, NP - 1)
    number, expert_sum, block_sum = _part_of(x, t_in, E, experts, BLOCKS)
    corner_sum = gl.expand_dims(expert_sum * (GROUPS * NP) + (block_sum // WIDE) * NP, 1)
    grid_sum = gl.load(grid + corner_sum + gl.expand_dims(row_sum, 0))
    factor = gl.load(factors + t_in // BLOCKS).to(gl.float32)
    if PDL and BEFORE:
        gdc_wait()
    known = (number >= 0) & (number < E)
    factor = gl.where(known, factor, float("nan"))
    scale = scale_of(grid_sum) * gl.expand_dims(factor, 1)
    inputs = inputs_at(x, TOP * K, TP, WARPS)
    total = sum_of(inputs, words, grid_words, scale, TP, BN, WARPS)
    PAIRS: gl.constexpr = vector_of(WARPS, 2)
    n = tile * BN + gl.arange(0, BN, layout=PAIRS)
    if HAS_BIAS:
        for part in gl.static_range(TOP):
            _, expert, _ = _part_of(x, part * BLOCKS, E, experts, BLOCKS)
            weight = gl.load(factors + part).to(gl.float32)
            own = gl.load(bias + expert * N + n, mask=n < N, other=0.0)
            total += weight * own.to(gl.float32)
    gl.store(y + n, total.to(y.dtype.element_ty), mask=n < N)
