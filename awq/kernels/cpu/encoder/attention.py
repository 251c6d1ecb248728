"""Attention of one head of one text: a few queries at a time over all keys that they see."""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from awq.kernels.cpu.emit import Emitter
from awq.kernels.cpu.encoder.phase import Phase
from awq.kernels.cpu.encoder.rows import moments
from awq.kernels.cpu.ir_types import F32, I32, I64, LANES, vec
from awq.kernels.cpu.maths import larger, quick_exp
from awq.kernels.cpu.values import Pointer, Value

QUERIES = 8  # that share one pass over the keys


def attend(p: Phase, index: Value) -> None:
    """context [tokens, heads · dim] of one head of one text."""
    b = p.b
    spec = p.spec
    text = index // spec.heads
    head = index % spec.heads
    start = b.sext(p.t.starts[text], I64)
    length = b.sext(p.t.starts[text + 1], I64) - start
    padded = (length + (LANES - 1)) & -LANES
    kv_head = head // (spec.heads // spec.kv_heads)
    rows = p.t.wide + start * spec.channels
    queries = rows + head * spec.dim
    keys = rows + (kv_head + spec.heads) * spec.dim
    values = rows + (kv_head + (spec.heads + spec.kv_heads)) * spec.dim
    context = p.t.context + (start * spec.context + head * spec.dim)
    transposed = p.t.scratch + p.worker * p.t.scratch_values
    scores = transposed + padded * spec.dim
    q = scores + padded * QUERIES
    _transpose_keys(p, keys, transposed, q, length, padded)

    def block(first: Value, count: int) -> None:
        for r in range(count):
            position = first + r
            query = queries + position * spec.channels
            prepared = q + r * spec.dim
            _prepare_query(p, query, prepared, position)

        sight = _sight(p, first, count, length, padded)
        tops = _scores(p, transposed, scores, q, head, first, count, sight)

        inverses = []
        for r, top in enumerate(tops):
            inverses.append(_softmax(b, scores + padded * r, top, sight))

        out = context + first * spec.context
        _gather(p, scores, values, out, inverses, sight)

    whole = length // QUERIES * QUERIES
    with b.loop(0, whole, QUERIES) as first:
        block(first, QUERIES)
    with b.loop(whole, length) as first:
        block(first, 1)


def _prepare_query(p: Phase, source: Pointer, target: Pointer, position: Value) -> None:
    """A head's channels of a query, times the scaling."""
    b = p.b
    spec = p.spec
    _prepare_head(p, source, target, position, p.layer.q_norm)
    scaling = b.const(vec(F32), spec.scaling)
    with b.loop(0, spec.dim, LANES) as i:
        target[i] = target.vector(i, LANES) * scaling


def _prepare_head(
    p: Phase,
    source: Pointer,
    target: Pointer,
    position: Value,
    norm: Pointer,
) -> None:
    """A head's channels, normalized and rotated where the model does so."""
    b = p.b
    spec = p.spec
    if spec.qk_norm:
        inverse, _ = moments(b, source, spec.dim, spec.qk_eps, False)
        with b.loop(0, spec.dim, LANES) as i:
            target[i] = source.vector(i, LANES) * b.splat(inverse) * norm.vector(i, LANES)
    else:
        with b.loop(0, spec.dim, LANES) as i:
            target[i] = source.vector(i, LANES)

    if not spec.rotary:
        return

    half = spec.rotary
    lanes = LANES if half % LANES == 0 else 8
    cos = p.layer.cos + position * half
    sin = p.layer.sin + position * half

    with b.loop(0, half, lanes) as i:
        left = target.vector(i, lanes)
        right = target.vector(i + half, lanes)
        c = cos.vector(i, lanes)
        s = sin.vector(i, lanes)
        target[i] = left * c - right * s
        target[i + half] = right * c + left * s


def _transpose_keys(
    p: Phase,
    keys: Pointer,
    transposed: Pointer,
    scratch: Pointer,
    length: Value,
    padded: Value,
) -> None:
    """transposed [dim, padded] of the keys, with zeros beyond the text's end."""
    b = p.b
    spec = p.spec
    with b.loop(0, length) as j:
        source = keys + j * spec.channels
        if spec.rotary or spec.qk_norm:
            _prepare_head(p, source, scratch, j, p.layer.k_norm)
            source = scratch

        with b.loop(0, spec.dim) as d:
            transposed[d * padded + j] = source[d]

    with b.loop(length, padded) as j, b.loop(0, spec.dim) as d:
        transposed[d * padded + j] = b.const(F32, 0.0)


class _Sight(NamedTuple):
    """Which keys a few queries see: from `start` up to `stop`, both multiples of 16.

    A text has `length` of them, and up to a multiple of 16 `padded`.
    """

    start: Value
    stop: Value
    length: Value
    padded: Value


def _sight(p: Phase, first: Value, count: int, length: Value, padded: Value) -> _Sight:
    """Of `count` queries from `first` on."""
    b = p.b
    spec = p.spec
    start = b.const(I64, 0)
    ahead = padded

    if spec.windowed:
        before = first - p.layer.window
        start = b.select(before > 0, before & -LANES, 0)
        ahead = p.layer.window

    if spec.causal:
        ahead = b.const(I64, 0)
    stop = (first + (count + LANES - 1) + ahead) & -LANES

    return _Sight(start, b.smaller(stop, padded), length, padded)


def _scores(
    p: Phase,
    transposed: Pointer,
    scores: Pointer,
    q: Pointer,
    head: Value,
    first: Value,
    count: int,
    sight: _Sight,
) -> list[Value]:
    """scores [count, padded] of queries from `first` on; what a query may not see is −∞. Returns
    each row's largest one."""
    b = p.b
    spec = p.spec
    padded = sight.padded
    counting = Value(b, ir.Constant(vec(I32), list(range(LANES))))
    last = b.splat(b.trunc(sight.length, I32))
    tops = [b.variable(vec(F32), float("-inf")) for _ in range(count)]
    window = b.splat(b.trunc(p.layer.window, I32)) if spec.windowed else None

    with b.loop(sight.start, sight.stop, LANES) as j:
        sums = [b.variable(vec(F32), 0.0) for _ in range(count)]
        with b.loop(0, spec.dim) as d:
            key = transposed.vector(d * padded + j, LANES)
            for r, place in enumerate(sums):
                place.value = b.fma(b.splat(q[d + r * spec.dim]), key, place.value)

        places = b.splat(b.trunc(j, I32)) + counting
        inside = places < last
        for r, place in enumerate(sums):
            score = place.value
            seen = inside
            if spec.relative:
                table = p.layer.relative + head * (p.t.max_distance * 2 - 1)
                score = score + table.vector(j - (first + r) + (p.t.max_distance - 1), LANES)

            distance = places - b.splat(b.trunc(first + r, I32))
            if window is not None:
                seen = seen & (distance <= window) & (-distance <= window)
            if spec.causal:
                seen = seen & (distance <= 0)

            score = b.select(seen, score, float("-inf"))
            scores[padded * r + j] = score
            tops[r].value = larger(b, score, tops[r].value)

    return [b.largest(top.value) for top in tops]


def _softmax(b: Emitter, row: Pointer, top: Value, sight: _Sight) -> Value:
    """row = e^(row − top); returns 1 / its sum."""
    total = b.variable(vec(F32), 0.0)
    with b.loop(sight.start, sight.stop, LANES) as j:
        weight = quick_exp(b, row.vector(j, LANES) - b.splat(top))
        row[j] = weight
        total.value = total.value + weight
    return 1.0 / b.sum(total.value)


def _gather(
    p: Phase,
    scores: Pointer,
    values: Pointer,
    context: Pointer,
    inverses: list[Value],
    sight: _Sight,
) -> None:
    """context rows = weights · values."""
    b = p.b
    spec = p.spec
    stop = b.smaller(sight.stop, sight.length)
    with b.loop(0, spec.dim, LANES) as i:
        sums = [b.variable(vec(F32), 0.0) for _ in inverses]
        with b.loop(sight.start, stop) as j:
            value = values.vector(j * spec.channels + i, LANES)
            for r, place in enumerate(sums):
                place.value = b.fma(b.splat(scores[sight.padded * r + j]), value, place.value)

        for r, (place, inverse) in enumerate(zip(sums, inverses)):
            context[i + r * spec.context] = place.value * b.splat(inverse)
