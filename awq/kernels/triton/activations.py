"""Activations of an MLP inside Triton kernels, and where gate and up are when one product makes
both."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activation(v, NAME: tl.constexpr):
    """The activation NAME of v, float32."""
    if NAME == "silu":
        y = v / (1.0 + tl.exp(-v))
    elif NAME == "gelu":
        y = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # 0.5·(1 + tanh(u/2)) is the logistic function of u
        u = 1.5957691216057308 * (v + 0.044715 * v * v * v)
        y = v / (1.0 + tl.exp(-u))
    elif NAME == "relu":
        y = tl.maximum(v, 0.0)
    else:
        tl.static_assert(NAME == "relu2", "unknown activation")
        y = tl.maximum(v, 0.0) * tl.maximum(v, 0.0)
    return y


@triton.jit
def columns(i, WIDTH: tl.constexpr, INTERLEAVE: tl.constexpr):
    """Where channels i of the gate and of up are among 2·WIDTH: INTERLEAVE of each in turn, or (0)
    all of one, then the other."""
    if INTERLEAVE == 0:
        gate = i
        up = i + WIDTH
    else:
        gate = (i // INTERLEAVE) * (2 * INTERLEAVE) + i % INTERLEAVE
        up = gate + INTERLEAVE
    return gate, up
