"""Activation functions on float32 vectors."""

from __future__ import annotations

from awq.kernels.cpu.emit import Emitter
from awq.kernels.cpu.values import Value

_SQRT_HALF = 0.7071067811865476
_TWICE_SQRT_2_OVER_PI = 1.5957691216057308


def activation(b: Emitter, v: Value, name: str) -> Value:
    """silu, gelu, gelu_tanh, relu2 (squared) or relu of each lane."""
    if name == "silu":
        return v * logistic(b, v)
    if name == "gelu_tanh":  # 0.5 · (1 + tanh(u/2)) is the logistic function of u
        inner = 0.044715 * (v * (v * v))
        return v * logistic(b, _TWICE_SQRT_2_OVER_PI * (v + inner))
    if name == "gelu":
        half = 0.5 * v
        return b.fma(half, erf(b, v * _SQRT_HALF), half)
    positive = b.maximum(v, 0.0)
    return positive * positive if name == "relu2" else positive


def logistic(b: Emitter, v: Value) -> Value:
    return 1.0 / (1.0 + b.exp(-v))


def erf(b: Emitter, x: Value) -> Value:
    """Abramowitz and Stegun 7.1.26: off by 1.5e-7 at most."""
    size = b.math("fabs", x)
    t = 1.0 / b.fma(b.const(x.type, 0.3275911), size, 1.0)
    y = b.const(x.type, 1.061405429)
    for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        y = b.fma(y, t, c)
    tail = y * t * b.exp(-(size * size))
    return b.math("copysign", 1.0 - tail, x)
