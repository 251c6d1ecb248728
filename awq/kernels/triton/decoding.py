"""Triton kernels between the products of a decode step: residual + norm, and activation; attention
is in `attending`.

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
