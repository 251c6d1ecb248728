"""Activation functions on float32 vectors.

`activation` is exact to float32. `quick_activation` and `quick_exp` are for values that become
16-bit integers right after: they are off by 5e-5 at most, take a third of the instructions, and do
not keep NaN.
"""

from __future__ import annotations

from awq.kernels.cpu.emit import Emitter
from awq.kernels.cpu.ir_types import I32, lanes_of, vec
from awq.kernels.cpu.values import Number, Value

# erf(x / √2) ≈ x · P(x²) for |x| ≤ 4.2, fitted at Chebyshev nodes; off by 2e-5 at most, and beyond
# it is ±1.
_ERF_LIMIT = 4.2
_ERF = (
    0.79788185,
    -0.13296633,
    0.0199243386,
    -0.00235793278,
    0.000223954519,
    -1.71044616e-05,
    1.02567704e-06,
    -4.59972907e-08,
    1.43031719e-09,
    -2.71781362e-11,
    2.35623124e-13,
)
_LOG2_E = 1.4426950408889634
# 2^r for |r| ≤ ½: ln2^k / k!
_POWERS = (
    1.0,
    0.693147181,
    0.240226507,
    0.0555041087,
    0.00961812911,
    0.00133335581,
    0.000154035304,
)
# Adding 1.5 · 2^23 to a small float leaves its nearest integer in the lowest bits.
_ROUNDER = 12582912.0
_ROUNDER_BITS = 0x4B400000

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


def larger(b: Emitter, v: Value, other: Number) -> Value:
    """The larger one, in one instruction; `other` when v is NaN."""
    right = other if isinstance(other, Value) else b.const(v.type, other)
    return b.select(v > right, v, right)


def lesser(b: Emitter, v: Value, other: Number) -> Value:
    """The smaller one, in one instruction; `other` when v is NaN."""
    right = other if isinstance(other, Value) else b.const(v.type, other)
    return b.select(v < right, v, right)


def nearest_int(b: Emitter, v: Value) -> Value:
    """int32 of floats below 2^22 in size."""
    ints = vec(I32, lanes_of(v.type))
    return b.bitcast(v + _ROUNDER, ints) - _ROUNDER_BITS


def quick_exp(b: Emitter, v: Value) -> Value:
    """e^v for v ≤ 88, to seven digits; at least 2^-126."""
    ints = vec(I32, lanes_of(v.type))
    t = larger(b, v * _LOG2_E, -126.0)
    shifted = t + _ROUNDER
    r = t - (shifted - _ROUNDER)
    y = b.const(v.type, _POWERS[-1])
    for c in _POWERS[-2::-1]:
        y = b.fma(y, r, c)

    power = (b.bitcast(shifted, ints) - _ROUNDER_BITS) << 23
    return b.bitcast(b.bitcast(y, ints) + power, v.type)


def quick_activation(b: Emitter, v: Value, name: str) -> Value:
    """`activation` without its last digits."""
    if name == "gelu":
        inside = lesser(b, larger(b, v, -_ERF_LIMIT), _ERF_LIMIT)
        square = inside * inside
        y = b.const(v.type, _ERF[-1])
        for c in _ERF[-2::-1]:
            y = b.fma(y, square, c)

        half = v * 0.5
        return b.fma(half, y * inside, half)
    if name in ("silu", "gelu_tanh"):
        u = v
        if name == "gelu_tanh":
            u = _TWICE_SQRT_2_OVER_PI * (v + 0.044715 * (v * (v * v)))
        return v / (quick_exp(b, lesser(b, -u, 88.0)) + 1.0)
    return activation(b, v, name)
