"""Triton kernel of attention of one new token per row over a cache."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from awq.kernels.triton.heads import channels_of, tables_of, turned


@triton.jit
def _combine(
    sums,
    peaks,
    place,
    active,
    out,
    DIM: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    SPLIT: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Adds what `active` programs have written from `place` on, in order, and stores heads [GROUP,
    DIM] at `out`."""
    g = tl.arange(0, GP)
    d = tl.arange(0, D)
    every = tl.arange(0, SPLIT)
    at = peaks + (place + every[:, None]) * (2 * G) + g[None, :]
    there = (every[:, None] < active) & (g[None, :] < G)
    top = tl.load(at, mask=there, other=-float("inf"), cache_modifier=".cg")
    highest = tl.max(top, 0)
    weights = tl.load(at + G, mask=there, other=0.0, cache_modifier=".cg")
    total = tl.sum(tl.exp(top - highest[None, :]) * weights, 0)
    acc = tl.zeros((GP, D), tl.float32)
    inside = (g[:, None] < GROUP) & (d[None, :] < DIM)

    for s in range(0, active, TOGETHER):
        # several loads are under way at once, or each would wait for the one before
        for other in tl.static_range(TOGETHER):
            program = s + other + 0 * g
            live = (program < active) & (g < G)
            from_peaks = peaks + (place + program) * (2 * G) + g
            peak = tl.load(from_peaks, mask=live, other=-float("inf"), cache_modifier=".cg")
            from_sums = sums + (place + program[:, None]) * (G * D) + g[:, None] * D + d[None, :]
            part = tl.load(from_sums, mask=live[:, None] & inside, other=0.0, cache_modifier=".cg")
            acc += part * tl.exp(peak - highest)[:, None]

    acc = acc / total[:, None]
    tl.store(
        out + g[:, None] * DIM + d[None, :],
        acc.to(out.dtype.element_ty),
        mask=(g[:, None] < GROUP) & (d[None, :] < DIM),
    )


@triton.jit
def _look(
    q,
    k,
    v,
    at,
    cached,
    peak,
    weight,
    acc,
    scaling,
    softcap,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Queries q [G, D] at keys k and values v [BLOCK, D] of places `at` before `cached`: the
    running peak, weight and sum."""
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
    if CAPPED:
        score = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * score / softcap)))
    score = tl.where(at[None, :] < cached, score, -float("inf"))
    above = tl.maximum(peak, tl.max(score, 1))
    p = tl.exp(score - above[:, None])
    shrink = tl.exp(peak - above)
    weight = weight * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None] + tl.dot(p.to(q.dtype), v, input_precision=PRECISION)

    return above, weight, acc


@triton.jit(do_not_specialize=["positions"])
def attend_kernel(
    qkv,
    cos,
    sin,
    q_weight,
    k_weight,
    lengths,
    k_cache,
    v_cache,
    out,
    sums,
    peaks,
    arrived,
    scaling,
    softcap,
    q_eps,
    k_eps,
    positions,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    SPLIT: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
    LEAST: tl.constexpr,
    LINES: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    NORMED: tl.constexpr,
    MEAN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One new token per row: norm and rotation of q and k, k and v into the cache, attention. Grid:
    (KV_HEADS, SPLIT, batch).

    qkv [batch, (HEADS + 2·KV_HEADS)·DIM]; cos, sin float32 [positions, R]; lengths int32 [batch],
    tokens cached before; k_cache, v_cache [batch, KV_HEADS, positions, DIM]; out [batch,
    HEADS·DIM]. The keys of a row are shared among SPLIT programs or fewer: up to LEAST, an even
    multiple of BLOCK, cost less in one program than in two that must meet, and where there are very
    many, few that meet late cost less than many. Each writes its float32 sums to `sums` [batch,
    KV_HEADS, SPLIT, G, D] and `peaks` [batch, KV_HEADS, SPLIT, 2, G], and the last to arrive adds
    them up in order. D, G: powers of two from DIM and HEADS/KV_HEADS up, at least 16; GP: that
    without the least; TOGETHER: programs whose sums are loaded at once. LINES: cache lines of 128
    bytes in a head, a power of two.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    head = tl.program_id(0)
    slice = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    dtype: tl.constexpr = qkv.dtype.element_ty
    PRECISION: tl.constexpr = "ieee" if dtype == tl.float32 else "tf32"
    length = tl.load(lengths + row)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length + 1 - WINDOW, 0)

    count = length + 1 - first
    least = tl.where((count <= LEAST) | (count > 4 * LEAST), LEAST, LEAST // 2)
    share = tl.maximum(tl.cdiv(tl.cdiv(count, SPLIT), BLOCK) * BLOCK, least)
    active = tl.cdiv(count, share)
    keys = k_cache + (row * KV_HEADS + head) * positions * DIM
    values = v_cache + (row * KV_HEADS + head) * positions * DIM
    begin = first + slice * share
    end = tl.minimum(begin + share, length + 1)

    if PDL:
        gdc_launch_dependents()
        # What is cached, and how much, was written before this step began, so it may be fetched
        # before the wait.
        for t in range(begin, end, BLOCK):
            at = tl.minimum(t + tl.arange(0, BLOCK), end - 1).to(tl.int64)[
                :, None
            ] * DIM + tl.arange(0, LINES)[None, :] * (DIM // LINES)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
                "=r,l",
                [keys + at],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
                "=r,l",
                [values + at],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )

    # Likewise the first keys and values that this program looks at, and what turns the heads.
    g = tl.arange(0, G)
    d = tl.arange(0, D)
    cached = tl.minimum(end, length)
    at = begin + tl.arange(0, BLOCK)
    where = at.to(tl.int64)[:, None] * DIM + d[None, :]
    seen = (at[:, None] < cached) & (d[None, :] < DIM)
    k_first = tl.load(keys + where, mask=seen, other=0.0)
    v_first = tl.load(values + where, mask=seen, other=0.0)
    q_own, q_other, c, s = tables_of(q_weight, cos, sin, length, DIM, D, R, NORMED)
    k_own, k_other, c, s = tables_of(k_weight, cos, sin, length, DIM, D, R, NORMED)
    if PDL:
        gdc_wait()
    if slice < active:
        channels = qkv + row * ((HEADS + 2 * KV_HEADS) * DIM)
        own = channels + (HEADS + head) * DIM
        one = tl.arange(0, 1)
        q, q_partner = channels_of(channels + head * (GROUP * DIM), g, GROUP, DIM, D, R)

        # all loads together, before any is used
        k_new, k_partner = channels_of(own, one, 1, DIM, D, R)
        v_new = tl.load(own + KV_HEADS * DIM + d, mask=d < DIM, other=0.0)
        q = turned(
            q,
            q_partner,
            g,
            q_own,
            q_other,
            c,
            s,
            q_eps,
            dtype,
            GROUP,
            DIM,
            D,
            R,
            NORMED,
            MEAN,
        ).to(dtype)
        peak = tl.full((G,), -float("inf"), tl.float32)
        weight = tl.zeros((G,), tl.float32)
        acc = tl.zeros((G, D), tl.float32)

        if begin < cached:
            peak, weight, acc = _look(
                q,
                k_first,
                v_first,
                at,
                cached,
                peak,
                weight,
                acc,
                scaling,
                softcap,
                CAPPED,
                PRECISION,
            )

        for t in range(begin + BLOCK, cached, BLOCK):
            at = t + tl.arange(0, BLOCK)
            where = at.to(tl.int64)[:, None] * DIM + d[None, :]
            seen = (at[:, None] < cached) & (d[None, :] < DIM)
            k = tl.load(keys + where, mask=seen, other=0.0)
            v = tl.load(values + where, mask=seen, other=0.0)
            peak, weight, acc = _look(
                q, k, v, at, cached, peak, weight, acc, scaling, softcap, CAPPED, PRECISION
            )

        if end == length + 1:
            # The new token is this program's. It comes from registers: what is stored now could be
            # read back only after a trip through the L2 cache.
            key = turned(
                k_new,
                k_partner,
                one,
                k_own,
                k_other,
                c,
                s,
                k_eps,
                dtype,
                1,
                DIM,
                D,
                R,
                NORMED,
                MEAN,
            ).to(dtype)
            place_new = length.to(tl.int64) * DIM
            tl.store(keys + place_new + d[None, :], key, mask=d[None, :] < DIM)
            tl.store(values + place_new + d, v_new, mask=d < DIM)
            score_new = tl.sum(q.to(tl.float32) * key.to(tl.float32), 1) * scaling
            if CAPPED:
                score_new = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * score_new / softcap)))

            above = tl.maximum(peak, score_new)
            p_new = tl.exp(score_new - above)
            shrink = tl.exp(peak - above)
            weight = weight * shrink + p_new
            acc = acc * shrink[:, None] + p_new[:, None] * v_new.to(tl.float32)[None, :]
            peak = above

        place = (row * KV_HEADS + head) * SPLIT
        result = out + row * (HEADS * DIM) + head * (GROUP * DIM) + g[:, None] * DIM + d[None, :]
        wanted = (g[:, None] < GROUP) & (d[None, :] < DIM)
        if active == 1:
            tl.store(result, (acc / weight[:, None]).to(dtype), mask=wanted)
        else:
            tl.store(
                sums + (place + slice) * (G * D) + g[:, None] * D + d[None, :], acc, mask=wanted
            )
            tl.store(peaks + (place + slice) * (2 * G) + g, peak)
            tl.store(peaks + (place + slice) * (2 * G) + G + g, weight)
            tl.debug_barrier()
            counter = arrived + row * KV_HEADS + head

            if tl.atomic_add(counter, 1, sem="acq_rel") == active - 1:
                first_head = out + row * (HEADS * DIM) + head * (GROUP * DIM)
                _combine(
                    sums, peaks, place, active, first_head, DIM, D, GROUP, G, GP, SPLIT, TOGETHER
                )
                tl.store(counter, 0)
