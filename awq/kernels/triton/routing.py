"""Triton kernels of a router: which experts a token goes to, and with which weights.

Residual sum, norm, the router's product, its scores and the choice are one kernel, for each costs
less than starting it. A token's experts are shared among programs. Each normalizes the row anew,
which is a few kilobytes, and computes the logits of some experts; the last to arrive has all of
them and chooses. Weights are loaded before the wait for the kernel in front.

The choice is a rank: an expert's place is the number of experts before it. That compares every
expert with every other, 16,384 comparisons for 128 experts, at once, where taking the best of them
`top_k` times would wait `top_k` times. Numbers that are no numbers rank last, so every place is
taken by one expert whatever the logits are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from awq.kernels.triton.decoding import normalized, residual_sum


@triton.jit
def _of_the_best_groups(
    choice, e, E: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr
):
    """choice of experts e, −∞ for those whose group is not among the KEPT best. A group is ranked
    like an expert, by its BEST highest, one or two."""
    SIZE: tl.constexpr = E // GROUPS
    NONE: tl.constexpr = -float("inf")
    group = e // SIZE
    same = group[:, None] == group[None, :]
    within = tl.where(same, choice[:, None], NONE)
    score = tl.max(within, 0)
    if BEST == 2:
        highest = score[None, :]
        at_top = same & (within == highest)
        several = tl.sum(at_top.to(tl.int32), 0) > 1
        below = tl.where(within < highest, within, NONE)
        second = tl.max(below, 0)
        score += tl.where(several, score, second)

    # one expert stands for each group, among the others along the first axis
    first = (e % SIZE == 0) & (e < E)
    mine = score[None, :]
    others = score[:, None]
    in_front = group[:, None] < group[None, :]
    before = (others > mine) | ((others == mine) & in_front)
    counted = first[:, None] & before
    rank = tl.sum(counted.to(tl.int32), 0)

    return tl.where(rank < KEPT, choice, NONE)


@triton.jit
def _choose(
    logits,
    e,
    correction,
    index,
    weights,
    row,
    factor,
    E: tl.constexpr,
    TOP: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZED: tl.constexpr,
    CORRECTED: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    BEST: tl.constexpr,
):
    """Stores the TOP experts of a row and their weights, the best first. logits float32 of experts
    e = 0 …, a power of two of them."""
    known = e < E
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logits))
    else:
        logits = tl.where(known, logits, -float("inf"))
        power = tl.exp(logits - tl.max(logits, 0))
        score = power / tl.sum(power, 0)

    choice = score
    if CORRECTED:
        choice += tl.load(correction + e, mask=known, other=0.0)

    choice = tl.where(known & (choice == choice), choice, -float("inf"))
    if GROUPS > 1:
        choice = _of_the_best_groups(choice, e, E, GROUPS, KEPT, BEST)

    # the others along the first axis, which threads hold, so that few of them have to meet
    above = choice[:, None] > choice[None, :]
    before = above | ((choice[:, None] == choice[None, :]) & (e[:, None] < e[None, :]))
    rank = tl.sum(before.to(tl.int32), 0)
    chosen = rank < TOP
    if NORMALIZED:
        score = score / tl.sum(tl.where(chosen, score, 0.0), 0)

    tl.store(index + row * TOP + rank, e, mask=chosen)
    tl.store(weights + row * TOP + rank, score * factor, mask=chosen)


@triton.jit
def choose_kernel(
    logits,
    correction,
    index,
    weights,
    factor,
    E: tl.constexpr,
    EP: tl.constexpr,
    TOP: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZED: tl.constexpr,
    CORRECTED: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    BEST: tl.constexpr,
    PDL: tl.constexpr,
):
    """index int32 and weights float32 [rows, TOP] of logits float32 [rows, E]. EP: a power of two
    from E up. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EP)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()

    found = tl.load(logits + row * E + e, mask=e < E, other=0.0)
    _choose(
        found,
        e,
        correction,
        index,
        weights,
        row,
        factor,
        E,
        TOP,
        SIGMOID,
        NORMALIZED,
        CORRECTED,
        GROUPS,
        KEPT,
        BEST,
    )


@triton.jit
def add_norm_route_kernel(
    x,
    branch,
    weight,
    bias,
    router,
    router_bias,
    correction,
    total,
    y,
    logits,
    index,
    weights,
    arrived,
    factor,
    eps,
    router_factor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    NORM: tl.constexpr,
    MEAN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    BE: tl.constexpr,
    TOP: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ROUTER_BIAS: tl.constexpr,
    CORRECTED: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    BEST: tl.constexpr,
    PDL: tl.constexpr,
):
    """`add_norm_kernel`, and index int32, weights float32 [rows, TOP] of its normalized rows by
    router [E, WIDTH]. Grid: (⌈E/BE⌉, rows).

    BE: experts of a program, EP or less. logits float32 [rows, E] and arrived int32 [rows] are used
    when it is less.
    """
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < WIDTH
    e = part * BE + tl.arange(0, BE)
    w = 0.0
    if PDL:
        gdc_launch_dependents()

    rows = tl.load(
        router + e[:, None] * WIDTH + i[None, :],
        mask=(e[:, None] < E) & inside[None, :],
        other=0.0,
    )
    if NORM and HAS_WEIGHT:
        w = tl.load(weight + i, mask=inside, other=0.0)
    if PDL:
        gdc_wait()

    value = residual_sum(x, branch, row, i, inside, factor, WIDTH, PARTS)
    normed = value
    if NORM:
        v = normalized(value, w, bias, i, inside, eps, WIDTH, MEAN, HAS_WEIGHT, HAS_BIAS)
        normed = v.to(y.dtype.element_ty)

    if part == 0:
        if PARTS > 0:
            tl.store(total + row * WIDTH + i, value, mask=inside)
        if NORM:
            tl.store(y + row * WIDTH + i, normed, mask=inside)

    found = tl.sum(rows.to(tl.float32) * normed.to(tl.float32)[None, :], 1)
    if ROUTER_BIAS:
        found += tl.load(router_bias + e, mask=e < E, other=0.0)
    if BE == EP:
        _choose(
            found,
            e,
            correction,
            index,
            weights,
            row,
            router_factor,
            E,
            TOP,
            SIGMOID,
            NORMALIZED,
            CORRECTED,
            GROUPS,
            KEPT,
            BEST,
        )
    else:
        tl.store(logits + row * E + e, found, mask=e < E)
        tl.debug_barrier()  # every thread's logits before the release by one of them
        if tl.atomic_add(arrived + row, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            every = tl.arange(0, EP)
            all_logits = tl.load(
                logits + row * E + every, mask=every < E, other=0.0, cache_modifier=".cg"
            )
            _choose(
                all_logits,
                every,
                correction,
                index,
                weights,
                row,
                router_factor,
                E,
                TOP,
                SIGMOID,
                NORMALIZED,
                CORRECTED,
                GROUPS,
                KEPT,
                BEST,
            )
            tl.store(arrived + row, 0)
