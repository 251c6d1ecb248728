"""CPU kernels between the products of a decode step, as LLVM IR: residual + norm, activation, attention of one new token, and a
dense product for few tokens (the output head).

A step of a small model has a hundred and more of these operations on a few thousand numbers each; in plain operators they take
as long as the products. Each function here returns the kernel's one part. Arithmetic is float32 throughout.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from awq.kernels.cpu.emit import F32, I32, I64, PTR, Emitter, Task, const, vec

ADD_NORM = ("threads", "x", "branch", "weight", "bias", "total", "y", "rows", "width", "factor", "eps")
ACTIVATE = ("threads", "h", "y", "rows", "width")
ATTEND = (
    "threads", "qkv", "cos", "sin", "q_weight", "k_weight", "lengths", "k_cache", "v_cache", "out", "scratch",
    "rows", "positions", "heads", "kv_heads", "dim", "rotary", "window", "scaling", "softcap", "q_eps", "k_eps", "longest",
)  # fmt: skip
DENSE = ("threads", "x", "weight", "y", "rows", "inputs", "outputs")
ZERO, ONE = const(I64, 0), const(I64, 1)


def emit_add_norm(module: ir.Module, element: ir.Type, add: bool, mean: bool, weight: bool, bias: bool) -> list[ir.Function]:
    """total = x + factor · branch (add; else total is x), y = norm(total), rows of `width`; mean: LayerNorm, else RMSNorm."""
    b, (task, index, count) = Emitter.define(module, "add_norm", [PTR, I64, I64])
    t = Task(b, task, ADD_NORM)
    x, branch, total, y, width, factor, eps = t.x, t.branch, t.total, t.y, t.width, t.number("factor"), t.number("eps")
    weights, biases = t.weight, t.bias
    with b.loop(*b.part(t.rows, index, count)) as row:
        start = b.mul(row, width)
        source, target = (b.at(base, start, element) for base in (total if add else x, y))
        if add:
            left, right = (b.at(base, start, element) for base in (x, branch))

            def put_sum(i: Any, lanes: int) -> None:
                value = b.math("fma", b.floats(right, i, element, lanes), b.splat(factor, lanes), b.floats(left, i, element, lanes))
                b.put(b.from_float(value, element), source, i, element)

            b.strip(width, put_sum)

        def scale(inverse: Any, center: Any) -> None:
            def put_norm(i: Any, lanes: int) -> None:
                value = b.floats(source, i, element, lanes)
                if center is not None:
                    value = b.fsub(value, b.splat(center, lanes))
                value = b.fmul(value, b.splat(inverse, lanes))
                if weight:
                    value = b.fmul(value, b.fetch(weights, i, F32, lanes))
                if bias:
                    value = b.fadd(value, b.fetch(biases, i, F32, lanes))
                b.put(b.from_float(value, element), target, i, element)

            b.strip(width, put_norm)

        scale(*_moments(b, source, element, width, eps, mean))
    b.ret_void()
    return [b.function]


def _moments(b: Emitter, source: Any, element: ir.Type, width: Any, eps: Any, mean: bool) -> tuple[Any, Any]:
    """(1/√(mean square + eps), mean or None) of `width` values."""
    size = b.sitofp(width, F32)
    center = b.fdiv(b.total(width, lambda i, lanes: b.floats(source, i, element, lanes)), size) if mean else None

    def square(i: Any, lanes: int) -> Any:
        value = b.floats(source, i, element, lanes)
        if center is not None:
            value = b.fsub(value, b.splat(center, lanes))
        return b.fmul(value, value)

    variance = b.fdiv(b.total(width, square), size)
    return b.fdiv(const(F32, 1.0), b.math("sqrt", b.fadd(variance, eps))), center


def emit_activate(module: ir.Module, element: ir.Type, name: str, gated: bool) -> list[ir.Function]:
    """y [rows, width] = act(h[:, :width]) · h[:, width:] (gated) or act(h)."""
    b, (task, index, count) = Emitter.define(module, "activate", [PTR, I64, I64])
    t = Task(b, task, ACTIVATE)
    h, y, width = t.h, t.y, t.width
    with b.loop(*b.part(t.rows, index, count)) as row:
        gate = b.at(h, b.mul(row, b.mul(width, const(I64, 2 if gated else 1))), element)
        up, target = b.at(gate, width, element), b.at(y, b.mul(row, width), element)

        def body(i: Any, lanes: int) -> None:
            value = _activation(b, b.floats(gate, i, element, lanes), name)
            if gated:
                rounded = b.to_float(b.from_float(value, element))
                value = b.fmul(rounded, b.floats(up, i, element, lanes))
            b.put(b.from_float(value, element), target, i, element)

        b.strip(width, body)
    b.ret_void()
    return [b.function]


def _logistic(b: Emitter, v: Any) -> Any:
    one = const(v.type, 1.0)
    return b.fdiv(one, b.fadd(one, b.exp(b.fneg(v))))


def _activation(b: Emitter, v: Any, name: str) -> Any:
    kind = v.type
    if name == "silu":
        return b.fmul(v, _logistic(b, v))
    if name == "gelu_tanh":  # 0.5 · (1 + tanh(u/2)) is the logistic function of u
        inner = b.fmul(const(kind, 0.044715), b.fmul(v, b.fmul(v, v)))
        return b.fmul(v, _logistic(b, b.fmul(const(kind, 1.5957691216057308), b.fadd(v, inner))))
    if name == "gelu":
        half = b.fmul(const(kind, 0.5), v)
        return b.math("fma", half, _erf(b, b.fmul(v, const(kind, 0.7071067811865476))), half)
    positive = b.math("maximum", v, const(kind, 0.0))
    return b.fmul(positive, positive) if name == "relu2" else positive


def _erf(b: Emitter, x: Any) -> Any:
    """Abramowitz and Stegun 7.1.26: off by 1.5e-7 at most."""
    kind = x.type
    size = b.math("fabs", x)
    t = b.fdiv(const(kind, 1.0), b.math("fma", const(kind, 0.3275911), size, const(kind, 1.0)))
    y = const(kind, 1.061405429)
    for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        y = b.math("fma", y, t, const(kind, c))
    tail = b.fmul(b.fmul(y, t), b.exp(b.fneg(b.fmul(size, size))))
    return b.math("copysign", b.fsub(const(kind, 1.0), tail), x)


def emit_attend(module: ir.Module, element: ir.Type, rotated: bool, normed: bool, mean: bool, capped: bool) -> list[ir.Function]:
    """One new token per row: norm and rotation of q and k, k and v into the cache, attention over the row's cache.

    qkv [rows, (heads + 2·kv_heads)·dim]; cos, sin float32 [positions, rotary]; lengths int32 [rows], tokens cached before;
    k_cache, v_cache [rows, kv_heads, positions, dim]; out [rows, heads·dim]; scratch float32 [threads, dim + longest + 1].
    """
    b, (task, index, count) = Emitter.define(module, "attend", [PTR, I64, I64])
    t = Task(b, task, ATTEND)
    heads, kv_heads, dim, positions, rotary = t.heads, t.kv_heads, t.dim, t.positions, t.rotary
    qkv, lengths, k_cache, v_cache, out, q_weight, k_weight = (
        t.qkv, t.lengths, t.k_cache, t.v_cache, t.out, t.q_weight, t.k_weight,
    )  # fmt: skip
    cos, sin, window, q_eps, k_eps = t.cos, t.sin, t.window, t.number("q_eps"), t.number("k_eps")
    scaling, softcap = t.number("scaling"), t.number("softcap")
    group = b.sdiv(heads, kv_heads)
    q = b.at(t.scratch, b.mul(index, b.add(b.add(dim, t.longest), ONE)), F32)
    scores = b.at(q, dim, F32)
    channels = b.add(heads, b.mul(kv_heads, const(I64, 2)))

    def prepare(source: Any, weights: Any, eps: Any, place: Any) -> None:
        """A head's channels, normalized and rotated, into q as float32."""
        _copy_head(b, source, element, q, dim, weights if normed else None, eps, mean)
        if rotated:
            _rotate(b, q, rotary, *(b.at(table, b.mul(place, rotary), F32) for table in (cos, sin)))

    with b.loop(*b.part(b.mul(t.rows, kv_heads), index, count)) as item:
        row, head = b.sdiv(item, kv_heads), b.srem(item, kv_heads)
        length = b.sext(b.fetch(lengths, row, I32), I64)
        base = b.at(qkv, b.mul(b.mul(row, channels), dim), element)
        keys, values = (b.at(cache, b.mul(b.mul(item, positions), dim), element) for cache in (k_cache, v_cache))
        new = b.mul(length, dim)
        prepare(b.at(base, b.mul(b.add(heads, head), dim), element), k_weight, k_eps, length)
        own = b.at(base, b.mul(b.add(b.add(heads, kv_heads), head), dim), element)

        def keep(i: Any, lanes: int) -> None:
            b.put(b.from_float(b.fetch(q, i, F32, lanes), element), keys, b.add(new, i), element)
            b.put(b.fetch(own, i, element, lanes), values, b.add(new, i), element)

        b.strip(dim, keep)
        stop = b.add(length, ONE)
        earliest = b.sub(stop, window)
        limited = b.and_(b.icmp_signed(">", window, ZERO), b.icmp_signed(">", earliest, ZERO))
        first = b.select(limited, earliest, ZERO)
        seen = b.sub(stop, first)
        with b.loop(ZERO, group) as member:
            which = b.mul(b.add(b.mul(head, group), member), dim)
            prepare(b.at(base, which, element), q_weight, q_eps, length)
            most = b.variable(F32, const(F32, float("-inf")))
            with b.loop(ZERO, seen) as j:
                key = b.at(keys, b.mul(b.add(first, j), dim), element)
                product = b.total(dim, lambda i, lanes: b.fmul(b.floats(key, i, element, lanes), b.fetch(q, i, F32, lanes)))
                score = b.fmul(product, scaling)
                if capped:  # softcap · tanh(score / softcap)
                    double = b.splat(b.fdiv(b.fmul(score, const(F32, 2.0)), softcap), 1)
                    logistic = b.extract_element(_logistic(b, double), const(I32, 0))
                    score = b.fmul(softcap, b.fsub(b.fmul(logistic, const(F32, 2.0)), const(F32, 1.0)))
                b.put(score, scores, j, F32)
                b.store(b.math("maximum", b.get(most, F32), score), most)
            top = b.get(most, F32)

            def weigh(i: Any, lanes: int) -> Any:
                weight = b.exp(b.fsub(b.fetch(scores, i, F32, lanes), b.splat(top, lanes)))
                b.put(weight, scores, i, F32)
                return weight

            inverse = b.fdiv(const(F32, 1.0), b.total(seen, weigh))
            result = b.at(out, b.add(b.mul(b.mul(row, heads), dim), which), element)

            def gather(i: Any, lanes: int) -> None:
                kind = vec(F32, lanes)
                acc = b.variable(kind, const(kind, 0.0))
                with b.loop(ZERO, seen) as j:
                    value = b.floats(values, b.add(b.mul(b.add(first, j), dim), i), element, lanes)
                    b.store(b.math("fma", value, b.splat(b.fetch(scores, j, F32), lanes), b.get(acc, kind)), acc)
                b.put(b.from_float(b.fmul(b.get(acc, kind), b.splat(inverse, lanes)), element), result, i, element)

            b.strip(dim, gather)
    b.ret_void()
    return [b.function]


def _copy_head(b: Emitter, source: Any, element: ir.Type, q: Any, dim: Any, weights: Any, eps: Any, mean: bool) -> None:
    inverse, center = _moments(b, source, element, dim, eps, mean) if weights is not None else (None, None)

    def body(i: Any, lanes: int) -> None:
        value = b.floats(source, i, element, lanes)
        if weights is not None:
            if center is not None:
                value = b.fsub(value, b.splat(center, lanes))
            value = b.fmul(b.fmul(value, b.splat(inverse, lanes)), b.fetch(weights, i, F32, lanes))
            value = b.to_float(b.from_float(value, element))
        b.put(value, q, i, F32)

    b.strip(dim, body)


def _rotate(b: Emitter, q: Any, rotary: Any, cos: Any, sin: Any) -> None:
    """The first 2 · rotary channels, as two halves."""
    other = b.at(q, rotary, F32)

    def body(i: Any, lanes: int) -> None:
        left, right, c, s = (b.fetch(base, i, F32, lanes) for base in (q, other, cos, sin))
        b.put(b.fsub(b.fmul(left, c), b.fmul(right, s)), q, i, F32)
        b.put(b.fadd(b.fmul(right, c), b.fmul(left, s)), other, i, F32)

    b.strip(rotary, body)


def emit_dense(module: ir.Module, element: ir.Type) -> list[ir.Function]:
    """y float32 [rows, outputs] = x float32 [rows, inputs] · weight [outputs, inputs]ᵀ, one output after the other."""
    b, (task, index, count) = Emitter.define(module, "dense", [PTR, I64, I64])
    t = Task(b, task, DENSE)
    x, weight, y, rows, inputs, outputs = t.x, t.weight, t.y, t.rows, t.inputs, t.outputs
    size = const(I64, 4 if element == F32 else 2)
    with b.loop(*b.part(outputs, index, count)) as n:
        line = b.at(weight, b.mul(n, inputs), element)
        with b.loop(ZERO, rows) as row:
            source = b.at(x, b.mul(row, inputs), F32)

            def products(i: Any, lanes: int) -> Any:
                b.prefetch(line, b.mul(b.add(i, inputs), size))  # the next line: the hardware's own stops where a page ends
                return b.fmul(b.fetch(source, i, F32, lanes), b.floats(line, i, element, lanes))

            b.put(b.total(inputs, products), y, b.add(b.mul(row, outputs), n), F32)
    b.ret_void()
    return [b.function]
