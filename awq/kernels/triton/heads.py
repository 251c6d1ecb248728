"""Triton kernels on heads of queries, keys and values: norm and rotation, for a step and for
prompts."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def tables_of(
    weight,
    cos,
    sin,
    position,
    DIM: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    NORMED: tl.constexpr,
):
    """What a head is normalized and rotated with, vectors [D]: the norm's weight for each channel
    and for its partner, cosine, and sine with the partner's sign."""
    d = tl.arange(0, D)
    partner = tl.where(d < R, d + R, tl.where(d < 2 * R, d - R, d))
    own = 1.0
    other = 1.0
    c = 1.0
    s = 0.0

    if NORMED:
        own = tl.load(weight + d, mask=d < DIM, other=0.0)
        if R > 0:
            other = tl.load(weight + partner, mask=d < DIM, other=0.0)

    if R > 0:
        f = tl.where(d < R, d, d - R)
        c = tl.load(cos + position * R + f, mask=d < 2 * R, other=1.0)
        s = tl.load(sin + position * R + f, mask=d < 2 * R, other=0.0)
        s = tl.where(d < R, -s, s)

    return own, other, c, s


@triton.jit
def channels_of(base, g, GROUP: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """Rows `g` of heads [GROUP, DIM] at `base` and the partners of their channels, float32
    [rows, D], zeros beyond DIM and GROUP."""
    d = tl.arange(0, D)
    inside = (g[:, None] < GROUP) & (d[None, :] < DIM)
    head = base + g[:, None] * DIM
    loaded = tl.load(head + d[None, :], mask=inside, other=0.0)
    v = loaded.to(tl.float32)
    u = v

    if R > 0:
        ahead = tl.where(d < 2 * R, d - R, d)
        partner = tl.where(d < R, d + R, ahead)
        loaded = tl.load(head + partner[None, :], mask=inside, other=0.0)
        u = loaded.to(tl.float32)

    return v, u


@triton.jit
def turned(
    v,
    u,
    g,
    own,
    other,
    c,
    s,
    eps,
    dtype: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    NORMED: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Heads v [rows, D] with partners u, normalized and rotated by `tables_of`; float32, zeros
    beyond DIM and GROUP."""
    d = tl.arange(0, D)
    inside = (g[:, None] < GROUP) & (d[None, :] < DIM)
    if NORMED:
        if MEAN:
            mean = tl.sum(v, 1)[:, None] / DIM
            v = tl.where(inside, v - mean, 0.0)
            if R > 0:
                u = u - mean

        variance = tl.sum(v * v, 1) / DIM
        inverse = tl.rsqrt(variance + eps)[:, None]
        v = (v * inverse * own[None, :]).to(dtype).to(tl.float32)
        if R > 0:
            u = (u * inverse * other[None, :]).to(dtype).to(tl.float32)

    if R > 0:
        v = v * c[None, :] + u * s[None, :]
    return tl.where(inside, v, 0.0)


@triton.jit
def head_of(
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
    v, u = channels_of(base, g, GROUP, DIM, D, R)
    own, other, c, s = tables_of(weight, cos, sin, position, DIM, D, R, NORMED)
    dtype: tl.constexpr = base.dtype.element_ty
    return turned(v, u, g, own, other, c, s, eps, dtype, GROUP, DIM, D, R, NORMED, MEAN)


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
    token = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = qkv.dtype.element_ty

    if PDL:
        gdc_launch_dependents()
        gdc_wait()

    d = tl.arange(0, D)
    h = tl.arange(0, HEADS2)
    kv = tl.arange(0, KV2)
    channels = qkv + (row * tokens + token) * ((HEADS + 2 * KV_HEADS) * DIM)
    position = start + token
    value = head_of(
        channels, h, HEADS, q_weight, q_eps, cos, sin, position, DIM, D, R, NORMED, MEAN
    )
    at = (row * HEADS + h[:, None]) * tokens.to(tl.int64) + token
    tl.store(
        q + at * DIM + d[None, :], value.to(dtype), mask=(h[:, None] < HEADS) & (d[None, :] < DIM)
    )
    value = head_of(
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
