"""What is computed token by token: embedding, norms, activations, integers; and pooling."""

from __future__ import annotations

from functools import partial

from awq.kernels.cpu.emit import Emitter
from awq.kernels.cpu.encoder.phase import Phase
from awq.kernels.cpu.ir_types import F32, I8, I32, I64, LANES, vec
from awq.kernels.cpu.maths import activation, larger, nearest_int, quick_activation
from awq.kernels.cpu.values import Pointer, Value


def quantize(p: Phase, row: Pointer, token: Value, width: int) -> None:
    """A row of float32 [width] to the planes, steps and sums of a token; one step for each
    group."""
    b = p.b
    spec = p.spec
    groups = width // spec.group
    planes = p.t.planes + token * spec.row_bytes(width)
    steps = p.t.steps + token * spec.row_groups(width)
    sums = p.t.sums + token * spec.row_groups(width)
    limit = 127.0 * 256 ** (spec.planes - 1)
    to_int = b.round_to_int if spec.planes > 2 else partial(nearest_int, b)

    with b.loop(0, groups) as g:
        start = g * spec.group
        most = b.variable(vec(F32), 0.0)
        with b.loop(start, start + spec.group, LANES) as k:
            most.value = larger(b, b.math("fabs", row.vector(k, LANES)), most.value)

        largest = b.largest(most.value)
        factor = b.splat(b.select(largest.differs(0.0), limit / largest, 0.0))
        total = b.variable(vec(I32), 0)
        with b.loop(start, start + spec.group, LANES) as k:
            v = to_int(row.vector(k, LANES) * factor)
            total.value = total.value + v
            for plane in range(spec.planes - 1, -1, -1):
                byte = b.trunc(v, vec(I8))
                planes[k + plane * width] = byte
                v = (v - b.sext(byte, vec(I32))) >> 8

        steps[g] = largest / limit
        sums[g] = b.signed_to_float(
            b.intrinsic("llvm.vector.reduce.add.v16i32", I32, [total.value]), F32
        )


def norm(p: Phase, source: Pointer, target: Pointer, weight: Pointer, bias: Pointer) -> None:
    """target = norm(source) · weight + bias over the hidden width; a weight that is not given means
    no norm."""
    b = p.b
    spec = p.spec
    width = b.const(I64, spec.hidden)
    with b.builder.if_else(weight.is_given().ir) as (normed, plain):
        with normed:
            inverse, center = moments(b, source, spec.hidden, spec.eps, spec.centered)
            with b.loop(0, width, LANES) as i:
                value = source.vector(i, LANES)
                if center is not None:
                    value = value - b.splat(center)
                value = value * b.splat(inverse)
                target[i] = b.fma(value, weight.vector(i, LANES), bias.vector(i, LANES))
        with plain, b.loop(0, width, LANES) as i:
            target[i] = source.vector(i, LANES)


def moments(
    b: Emitter,
    source: Pointer,
    width: int,
    eps: float,
    centered: bool,
) -> tuple[Value, Value | None]:
    """(1/√(mean square + eps), mean or None) of a row."""
    center = None
    if centered:
        total = b.variable(vec(F32), 0.0)
        with b.loop(0, width, LANES) as i:
            total.value = total.value + source.vector(i, LANES)
        center = b.sum(total.value) / float(width)

    squares = b.variable(vec(F32), 0.0)
    with b.loop(0, width, LANES) as i:
        value = source.vector(i, LANES)
        if center is not None:
            value = value - b.splat(center)
        squares.value = b.fma(value, value, squares.value)

    return 1.0 / b.math("sqrt", b.sum(squares.value) / float(width) + eps), center


def embed(p: Phase, token: Value) -> None:
    """hidden = norm(word + position + type); norms that come first then make what the first layer
    reads."""
    b = p.b
    spec = p.spec
    row = p.t.hidden + token * spec.hidden
    word = p.t.words + b.sext(p.t.ids[token], I64) * spec.hidden

    tables = []
    for table, index in ((p.t.position_table, p.t.positions), (p.t.type_table, p.t.types)):
        place = b.variable(I64, 0)
        with b.when(table.is_given()):
            place.value = b.sext(index[token], I64)
        tables.append((table, place.value * spec.hidden))

    with b.loop(0, spec.hidden, LANES) as i:
        row[i] = word.floats(i, LANES) * spec.words_factor
    for table, offset in tables:
        with b.when(table.is_given()), b.loop(0, spec.hidden, LANES) as i:
            row[i] = row.vector(i, LANES) + table.vector(offset + i, LANES)

    if spec.embedding_norm:
        norm(p, row, row, p.t.norm_weight, p.t.norm_bias)
    if spec.pre_norm:
        branch = p.t.branch + token * spec.hidden
        norm(p, row, branch, p.t.first_norm_weight, p.t.first_norm_bias)
        row = branch

    quantize(p, row, token, spec.hidden)


def add_norm(p: Phase, token: Value, number: int) -> None:
    """hidden = hidden + branch, its norm to integers. Where norms come last, or at the end, hidden
    becomes the norm."""
    b = p.b
    spec = p.spec
    row = p.t.hidden + token * spec.hidden
    branch = p.t.branch + token * spec.hidden
    weight, bias = _weights_of(p, f"norm{number}")
    if spec.post_norms:
        norm(p, branch, branch, *_weights_of(p, f"post{number}"))
    with b.loop(0, spec.hidden, LANES) as i:
        row[i] = row.vector(i, LANES) + branch.vector(i, LANES)
    if not spec.pre_norm:
        norm(p, row, row, weight, bias)
        quantize(p, row, token, spec.hidden)
        return

    norm(p, row, branch, weight, bias)
    if number == 2:
        with b.when(p.layer.keep_norm2.differs(0)), b.loop(0, spec.hidden, LANES) as i:
            row[i] = branch.vector(i, LANES)

    quantize(p, branch, token, spec.hidden)


def _weights_of(p: Phase, name: str) -> tuple[Pointer, Pointer]:
    """(weight, bias) of one of the layer's norms."""
    return getattr(p.layer, f"{name}_weight"), getattr(p.layer, f"{name}_bias")


def quantize_context(p: Phase, token: Value) -> None:
    quantize(p, p.t.context + token * p.spec.context, token, p.spec.context)


def activate(p: Phase, token: Value) -> None:
    """act(up), or act(gate) · up, to integers."""
    b = p.b
    spec = p.spec
    row = p.t.wide + token * (spec.inner * (2 if spec.gated else 1))
    act = activation if spec.planes > 2 else quick_activation

    with b.loop(0, spec.inner, LANES) as i:
        value = act(b, row.vector(i, LANES), spec.activation)
        if spec.gated:
            value = value * row.vector(i + spec.inner, LANES)
        row[i] = value

    quantize(p, row, token, spec.inner)


def pool(p: Phase, text: Value) -> None:
    """out [texts, hidden]: the mean over a text's tokens without its prompt, its first or its last
    token; norm 1 if asked."""
    b = p.b
    spec = p.spec
    begin = b.sext(p.t.starts[text], I64)
    end = b.sext(p.t.starts[text + 1], I64)
    first = b.smaller(begin + p.t.prompt_tokens, end - 1)
    rows = {"mean": (first, end), "cls": (first, first + 1), "lasttoken": (end - 1, end)}
    start, stop = rows[spec.pooling]
    count = b.splat(b.signed_to_float(stop - start, F32))
    out = p.t.out + text * spec.hidden
    squares = b.variable(vec(F32), 0.0)

    with b.loop(0, spec.hidden, LANES) as i:
        total = b.variable(vec(F32), 0.0)
        with b.loop(start, stop) as token:
            total.value = total.value + p.t.hidden.vector(token * spec.hidden + i, LANES)
        value = total.value / count
        out[i] = value
        squares.value = b.fma(value, value, squares.value)

    if spec.normalize:
        size = b.math("sqrt", b.sum(squares.value))
        size = b.maximum(size, 1e-12)
        factor = b.splat(1.0 / size)
        with b.loop(0, spec.hidden, LANES) as i:
            out[i] = out.vector(i, LANES) * factor
