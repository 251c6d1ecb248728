"""CPU kernels between the products of a decode step, as LLVM IR: residual + norm, activation,
attention of one new token, and a dense product for few tokens (the output head).

A step of a small model has a hundred and more of these operations on a few thousand numbers each;
in plain operators they take as long as the products. Each function here returns the kernel's one
part. Arithmetic is float32 throughout.
"""

from __future__ import annotations

from llvmlite import ir

from awq.kernels.cpu.emit import Emitter
from awq.kernels.cpu.ir_types import F32, I8, I32, I64, vec
from awq.kernels.cpu.maths import activation, logistic
from awq.kernels.cpu.task import COUNT, ELEMENT, FLOAT, Array, Task
from awq.kernels.cpu.values import Pointer, Value

ADD_NORM = Task(
    threads=COUNT,
    x=Array(ELEMENT),
    branch=Array(ELEMENT),
    weight=Array(F32),
    bias=Array(F32),
    total=Array(ELEMENT),
    y=Array(ELEMENT),
    rows=COUNT,
    width=COUNT,
    factor=FLOAT,
    eps=FLOAT,
)
ACTIVATE = Task(threads=COUNT, h=Array(ELEMENT), y=Array(ELEMENT), rows=COUNT, width=COUNT)
ATTEND = Task(
    threads=COUNT,
    qkv=Array(ELEMENT),
    cos=Array(F32),
    sin=Array(F32),
    q_weight=Array(F32),
    k_weight=Array(F32),
    lengths=Array(I32),
    k_cache=Array(ELEMENT),
    v_cache=Array(ELEMENT),
    out=Array(ELEMENT),
    scratch=Array(F32),
    rows=COUNT,
    positions=COUNT,
    heads=COUNT,
    kv_heads=COUNT,
    dim=COUNT,
    rotary=COUNT,
    window=COUNT,
    scaling=FLOAT,
    softcap=FLOAT,
    q_eps=FLOAT,
    k_eps=FLOAT,
    longest=COUNT,
)
DENSE = Task(
    threads=COUNT,
    x=Array(F32),
    weight=Array(ELEMENT),
    y=Array(F32),
    rows=COUNT,
    inputs=COUNT,
    outputs=COUNT,
)


def emit_add_norm(
    module: ir.Module,
    element: ir.Type,
    add: bool,
    mean: bool,
    weight: bool,
    bias: bool,
) -> list[ir.Function]:
    """total = x + factor · branch (add; else total is x), y = norm(total), rows of `width`; mean:
    LayerNorm, else RMSNorm.

    y = F.layer_norm(total, [width], weight, bias, eps), or F.rms_norm(total, [width], weight, eps)
    + bias
    """
    b, task, index, count = Emitter.define_part(module, "add_norm")
    t = ADD_NORM.reader(b, task, element)
    x = t.x
    branch = t.branch
    total = t.total
    y = t.y
    width = t.width
    factor = t.factor
    eps = t.eps
    weights = t.weight
    biases = t.bias

    with b.loop(*b.part(t.rows, index, count)) as row:
        start = row * width
        source = (total if add else x) + start
        target = y + start

        if add:
            left = x + start
            right = branch + start

            def put_sum(i: Value, lanes: int) -> None:
                value = b.fma(right.floats(i, lanes), b.splat(factor, lanes), left.floats(i, lanes))
                source.put_floats(i, value)

            b.strip(width, put_sum)

        inverse, center = _moments(b, source, width, eps, mean)

        def put_norm(i: Value, lanes: int) -> None:
            value = source.floats(i, lanes)
            if center is not None:
                value = value - b.splat(center, lanes)
            value = value * b.splat(inverse, lanes)
            if weight:
                value = value * weights.vector(i, lanes)
            if bias:
                value = value + biases.vector(i, lanes)

            target.put_floats(i, value)

        b.strip(width, put_norm)

    return [b.finish()]


def _moments(
    b: Emitter,
    source: Pointer,
    width: Value,
    eps: Value,
    mean: bool,
) -> tuple[Value, Value | None]:
    """(1/√(mean square + eps), mean or None) of `width` values."""
    size = b.signed_to_float(width, F32)
    center = b.total(width, source.floats) / size if mean else None

    def square(i: Value, lanes: int) -> Value:
        value = source.floats(i, lanes)
        if center is not None:
            value = value - b.splat(center, lanes)
        return value * value

    variance = b.total(width, square) / size
    deviation = b.math("sqrt", variance + eps)

    return 1.0 / deviation, center


def emit_activate(module: ir.Module, element: ir.Type, name: str, gated: bool) -> list[ir.Function]:
    """y [rows, width] = act(h[:, :width]) · h[:, width:] (gated) or act(h)."""
    b, task, index, count = Emitter.define_part(module, "activate")
    t = ACTIVATE.reader(b, task, element)
    h = t.h
    y = t.y
    width = t.width

    with b.loop(*b.part(t.rows, index, count)) as row:
        gate = h + row * (width * (2 if gated else 1))
        up = gate + width
        target = y + row * width

        def body(i: Value, lanes: int) -> None:
            value = activation(b, gate.floats(i, lanes), name)
            if gated:
                rounded = b.to_float(b.from_float(value, element))
                value = rounded * up.floats(i, lanes)
            target.put_floats(i, value)

        b.strip(width, body)

    return [b.finish()]


def emit_attend(
    module: ir.Module,
    element: ir.Type,
    rotated: bool,
    normed: bool,
    mean: bool,
    capped: bool,
) -> list[ir.Function]:
    """One new token per row: norm and rotation of q and k, k and v into the cache, attention over
    the row's cache.

    qkv [rows, (heads + 2·kv_heads)·dim]; cos, sin float32 [positions, rotary]; lengths int32
    [rows], tokens cached before; k_cache, v_cache [rows, kv_heads, positions, dim]; out [rows,
    heads·dim]; scratch float32 [threads, dim + longest + 1].

    out = softmax(q @ k.mT * scaling) @ v over the last `window` tokens (0: all of them)
    """
    b, task, index, count = Emitter.define_part(module, "attend")
    t = ATTEND.reader(b, task, element)
    heads = t.heads
    kv_heads = t.kv_heads
    dim = t.dim
    positions = t.positions
    rotary = t.rotary
    qkv = t.qkv
    lengths = t.lengths
    k_cache = t.k_cache
    v_cache = t.v_cache
    out = t.out
    q_weight = t.q_weight
    k_weight = t.k_weight
    cos = t.cos
    sin = t.sin
    window = t.window
    q_eps = t.q_eps
    k_eps = t.k_eps
    scaling = t.scaling
    softcap = t.softcap
    group = heads // kv_heads
    q = t.scratch + index * (dim + t.longest + 1)
    scores = q + dim
    channels = heads + kv_heads * 2

    def prepare(source: Pointer, weights: Pointer, eps: Value, place: Value) -> None:
        """A head's channels, normalized and rotated, into q as float32."""
        _copy_head(b, source, q, dim, weights if normed else None, eps, mean)
        if rotated:
            _rotate(b, q, rotary, *(table + place * rotary for table in (cos, sin)))

    with b.loop(*b.part(t.rows * kv_heads, index, count)) as item:
        row = item // kv_heads
        head = item % kv_heads
        length = b.sext(lengths[row], I64)
        base = qkv + row * channels * dim
        keys, values = (cache + item * positions * dim for cache in (k_cache, v_cache))
        new = length * dim
        prepare(base + (heads + head) * dim, k_weight, k_eps, length)
        own = base + (heads + kv_heads + head) * dim

        def keep(i: Value, lanes: int) -> None:
            keys[new + i] = b.from_float(q.vector(i, lanes), element)
            values[new + i] = own.vector(i, lanes)

        b.strip(dim, keep)
        stop = length + 1
        earliest = stop - window
        limited = (window > 0) & (earliest > 0)
        first = b.select(limited, earliest, 0)
        seen = stop - first

        with b.loop(0, group) as member:
            which = (head * group + member) * dim
            prepare(base + which, q_weight, q_eps, length)
            most = b.variable(F32, float("-inf"))
            with b.loop(0, seen) as j:
                key = keys + (first + j) * dim
                product = b.total(dim, lambda i, lanes: key.floats(i, lanes) * q.vector(i, lanes))
                score = product * scaling
                if capped:  # softcap · tanh(score / softcap)
                    double = b.splat(score * 2.0 / softcap, 1)
                    share = b.lane(logistic(b, double), 0)
                    score = softcap * (share * 2.0 - 1.0)

                scores[j] = score
                most.value = b.maximum(most.value, score)

            top = most.value

            def weigh(i: Value, lanes: int) -> Value:
                weight = b.exp(scores.vector(i, lanes) - b.splat(top, lanes))
                scores[i] = weight
                return weight

            inverse = 1.0 / b.total(seen, weigh)
            result = out + (row * heads * dim + which)

            def gather(i: Value, lanes: int) -> None:
                acc = b.variable(vec(F32, lanes), 0.0)
                with b.loop(0, seen) as j:
                    value = values.floats((first + j) * dim + i, lanes)
                    acc.value = b.fma(value, b.splat(scores[j], lanes), acc.value)
                result.put_floats(i, acc.value * b.splat(inverse, lanes))

            b.strip(dim, gather)

    return [b.finish()]


def _copy_head(
    b: Emitter,
    source: Pointer,
    q: Pointer,
    dim: Value,
    weights: Pointer | None,
    eps: Value,
    mean: bool,
) -> None:
    """q = source as float32; with weights: its norm, rounded to source's type."""
    if weights is None:
        b.strip(dim, lambda i, lanes: q.put_floats(i, source.floats(i, lanes)))
        return

    inverse, center = _moments(b, source, dim, eps, mean)

    def body(i: Value, lanes: int) -> None:
        value = source.floats(i, lanes)
        if center is not None:
            value = value - b.splat(center, lanes)
        value = value * b.splat(inverse, lanes) * weights.vector(i, lanes)
        q[i] = b.to_float(b.from_float(value, source.element))

    b.strip(dim, body)


def _rotate(b: Emitter, q: Pointer, rotary: Value, cos: Pointer, sin: Pointer) -> None:
    """The first 2 · rotary channels, as two halves."""
    other = q + rotary

    def body(i: Value, lanes: int) -> None:
        left, right, c, s = (base.vector(i, lanes) for base in (q, other, cos, sin))
        q[i] = left * c - right * s
        other[i] = right * c + left * s

    b.strip(rotary, body)


def emit_dense(module: ir.Module, element: ir.Type) -> list[ir.Function]:
    """y float32 [rows, outputs] = x float32 [rows, inputs] @ weight [outputs, inputs].T, one output
    after the other."""
    b, task, index, count = Emitter.define_part(module, "dense")
    t = DENSE.reader(b, task, element)
    x = t.x
    weight = t.weight
    y = t.y
    rows = t.rows
    inputs = t.inputs
    outputs = t.outputs
    value_bytes = 4 if element == F32 else 2

    with b.loop(*b.part(outputs, index, count)) as n:
        line = weight + n * inputs
        with b.loop(0, rows) as row:
            source = x + row * inputs

            def products(i: Value, lanes: int) -> Value:
                # The next line: the hardware's own prefetch stops where a page ends.
                b.prefetch(b.as_type(line, I8) + (i + inputs) * value_bytes)
                return source.vector(i, lanes) * line.floats(i, lanes)

            y[row * outputs + n] = b.total(inputs, products)

    return [b.finish()]
