"""Triton kernels between the products of a decode step: residual + norm, activation, and attention
of one new token.

Few launches matter more than few bytes here: a step of a 7B model has 32 blocks, and every kernel
costs a microsecond or two however little it does. So each of the three does all there is to do
between two products. They wait for the kernel in front as the products do (programmatic dependent
launch), and one that is waited for costs less.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from awq.kernels.triton.activations import activation, columns


@triton.jit
def residual_sum(x, branch, row, i, inside, factor, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """x + factor · branch at channels i of a row, rounded to x's dtype. The branch is the sum of
    PARTS rows, added in order in float32."""
    own = x + row * WIDTH + i
    value = tl.load(own, mask=inside, other=0.0)
    if PARTS > 0:
        first = branch + row * (PARTS * WIDTH) + i
        one = tl.load(first, mask=inside, other=0.0)
        added = one.to(tl.float32)
        for part in tl.static_range(1, PARTS):
            at = first + part * WIDTH
            one = tl.load(at, mask=inside, other=0.0)
            added += one.to(tl.float32)
        total = value.to(tl.float32) + factor * added
        value = total.to(value.dtype)
    return value


@triton.jit
def normalized(
    value,
    w,
    bias,
    i,
    inside,
    eps,
    WIDTH: tl.constexpr,
    MEAN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """The norm of a row, float32. w: its weight, loaded before the wait for the kernel in front."""
    v = value.to(tl.float32)
    if MEAN:
        v = tl.where(inside, v - tl.sum(v) / WIDTH, 0.0)
    v = v * tl.rsqrt(tl.sum(v * v) / WIDTH + eps)
    if HAS_WEIGHT:
        v = v * w
    if HAS_BIAS:
        v = v + tl.load(bias + i, mask=inside, other=0.0)
    return v


@triton.jit
def add_norm_kernel(
    x,
    branch,
    weight,
    bias,
    total,
    y,
    factor,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    NORM: tl.constexpr,
    MEAN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """total = x + factor · branch (PARTS > 0), y = norm(total) (NORM), rows of WIDTH. Grid:
    (rows,). Sums and norm in float32."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < WIDTH
    w = 0.0
    if PDL:
        gdc_launch_dependents()
    if NORM and HAS_WEIGHT:
        w = tl.load(weight + i, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
    value = residual_sum(x, branch, row, i, inside, factor, WIDTH, PARTS)
    if PARTS > 0:
        tl.store(total + row * WIDTH + i, value, mask=inside)
    if NORM:
        v = normalized(value, w, bias, i, inside, eps, WIDTH, MEAN, HAS_WEIGHT, HAS_BIAS)
        tl.store(y + row * WIDTH + i, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def activate_kernel(
    h,
    y,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    PDL: tl.constexpr,
):
    """y [rows, WIDTH] = act(h), or (GATED) act(gate) · up of h [rows, 2·WIDTH], see `columns`.
    Grid: (⌈WIDTH/BLOCK⌉, rows)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = i < WIDTH
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if GATED:
        gate, up = columns(i, WIDTH, INTERLEAVE)
        v = activation(
            tl.load(h + row * (2 * WIDTH) + gate, mask=inside, other=0.0).to(tl.float32), NAME
        )
        v = v.to(h.dtype.element_ty).to(tl.float32) * tl.load(
            h + row * (2 * WIDTH) + up, mask=inside, other=0.0
        ).to(tl.float32)
    else:
        v = activation(tl.load(h + row * WIDTH + i, mask=inside, other=0.0).to(tl.float32), NAME)
    tl.store(y + row * WIDTH + i, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _head(
    base,
    g,
    GROUP: tl.constexpr,
    weight,
    eps,
    cos,
    sin,
    position,
    DIM: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    NORMED: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Rows `g` of heads [GROUP, DIM] at `base`, normalized and rotated: float32 [rows, D], zeros
    beyond DIM and GROUP."""
    d = tl.arange(0, D)
    inside = (g[:, None] < GROUP) & (d[None, :] < DIM)
    v = tl.load(base + g[:, None] * DIM + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if R > 0:
        partner = tl.where(d < R, d + R, tl.where(d < 2 * R, d - R, d))
        u = tl.load(base + g[:, None] * DIM + partner[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
    if NORMED:
        if MEAN:
            mean = tl.sum(v, 1)[:, None] / DIM
            v = tl.where(inside, v - mean, 0.0)
            if R > 0:
                u = u - mean
        inverse = tl.rsqrt(tl.sum(v * v, 1) / DIM + eps)[:, None]
        dtype = base.dtype.element_ty
        v = (
            (v * inverse * tl.load(weight + d, mask=d < DIM, other=0.0)[None, :])
            .to(dtype)
            .to(tl.float32)
        )
        if R > 0:
            u = (
                (u * inverse * tl.load(weight + partner, mask=d < DIM, other=0.0)[None, :])
                .to(dtype)
                .to(tl.float32)
            )
    if R > 0:
        f = tl.where(d < R, d, d - R)
        rotated = d < 2 * R
        c = tl.load(cos + position * R + f, mask=rotated, other=1.0)
        s = tl.load(sin + position * R + f, mask=rotated, other=0.0)
        v = v * c[None, :] + u * tl.where(d < R, -s, s)[None, :]
    return tl.where(inside, v, 0.0)


@triton.jit(do_not_specialize=["tokens", "start", "positions"])
def split_kernel(
    qkv,
    cos,
    sin,
    q_weight,
    k_weight,
    q,
    k_cache,
    v_cache,
    q_eps,
    k_eps,
    tokens,
    start,
    positions,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HEADS2: tl.constexpr,
    KV2: tl.constexpr,
    NORMED: tl.constexpr,
    MEAN: tl.constexpr,
    PDL: tl.constexpr,
):
    """A piece of the prompts: norm and rotation of q and k, q to [batch, HEADS, tokens, DIM], k and
    v into the cache.

    qkv [batch, tokens, (HEADS + 2·KV_HEADS)·DIM]; the tokens are positions start, start + 1, … of
    the cache, which has
    `positions`. HEADS2, KV2: powers of two from HEADS and KV_HEADS up. Grid: (tokens, batch).
    """
    token, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = qkv.dtype.element_ty
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    d, h, kv = tl.arange(0, D), tl.arange(0, HEADS2), tl.arange(0, KV2)
    channels = qkv + (row * tokens + token) * ((HEADS + 2 * KV_HEADS) * DIM)
    position = start + token
    value = _head(channels, h, HEADS, q_weight, q_eps, cos, sin, position, DIM, D, R, NORMED, MEAN)
    at = (row * HEADS + h[:, None]) * tokens.to(tl.int64) + token
    tl.store(
        q + at * DIM + d[None, :], value.to(dtype), mask=(h[:, None] < HEADS) & (d[None, :] < DIM)
    )
    value = _head(
        channels + HEADS * DIM,
        kv,
        KV_HEADS,
        k_weight,
        k_eps,
        cos,
        sin,
        position,
        DIM,
        D,
        R,
        NORMED,
        MEAN,
    )
    at = (row * KV_HEADS + kv[:, None]) * positions.to(tl.int64) + position
    inside = (kv[:, None] < KV_HEADS) & (d[None, :] < DIM)
    tl.store(k_cache + at * DIM + d[None, :], value.to(dtype), mask=inside)
    value = tl.load(
        channels + (HEADS + KV_HEADS) * DIM + kv[:, None] * DIM + d[None, :], mask=inside, other=0.0
    )
    tl.store(v_cache + at * DIM + d[None, :], value, mask=inside)


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
    g, d, every = tl.arange(0, GP), tl.arange(0, D), tl.arange(0, SPLIT)
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
    head, slice, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
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
        gdc_wait()
    if slice < active:
        g, d = tl.arange(0, G), tl.arange(0, D)
        channels = qkv + row * ((HEADS + 2 * KV_HEADS) * DIM)
        q = _head(
            channels + head * (GROUP * DIM),
            g,
            GROUP,
            q_weight,
            q_eps,
            cos,
            sin,
            length,
            DIM,
            D,
            R,
            NORMED,
            MEAN,
        ).to(dtype)
        peak = tl.full((G,), -float("inf"), tl.float32)
        weight = tl.zeros((G,), tl.float32)
        acc = tl.zeros((G, D), tl.float32)
        cached = tl.minimum(end, length)
        for t in range(begin, cached, BLOCK):
            at = t + tl.arange(0, BLOCK)
            where = at.to(tl.int64)[:, None] * DIM + d[None, :]
            seen = (at[:, None] < cached) & (d[None, :] < DIM)
            k = tl.load(keys + where, mask=seen, other=0.0)
            v = tl.load(values + where, mask=seen, other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
            if CAPPED:
                score = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * score / softcap)))
            score = tl.where(at[None, :] < cached, score, -float("inf"))
            above = tl.maximum(peak, tl.max(score, 1))
            p = tl.exp(score - above[:, None])
            shrink = tl.exp(peak - above)
            weight = weight * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + tl.dot(p.to(dtype), v, input_precision=PRECISION)
            peak = above
        if end == length + 1:
            # The new token is this program's. It comes from registers: what is stored now could be
            # read back only after a trip through the L2 cache.
            own = channels + (HEADS + head) * DIM
            one = tl.arange(0, 1)
            k_new = _head(own, one, 1, k_weight, k_eps, cos, sin, length, DIM, D, R, NORMED, MEAN)
            k_new = k_new.to(dtype)
            v_new = tl.load(own + KV_HEADS * DIM + d, mask=d < DIM, other=0.0)
            place_new = length.to(tl.int64) * DIM
            tl.store(keys + place_new + d[None, :], k_new, mask=d[None, :] < DIM)
            tl.store(values + place_new + d, v_new, mask=d < DIM)
            score_new = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1) * scaling
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
