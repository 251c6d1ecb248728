"""The CPU kernels, as LLVM IR: activations to bytes, then products of nibbles and bytes.

A row of activations is cut into chunks (a group of the weight, or a part of one). A chunk becomes integers v = x / step, which
are the digits of a number to the base 256, one int8 for each plane: |v| is at most 127, 127 · 256 or 127 · 256². For a chunk

    Σ (q − z) · s · x  =  s · step · (Σ q · v − z · Σ v)

where the sum over one plane is exact in int32, and planes are put together in float32.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from awq.kernels.cpu.emit import F16, F32, I8, I16, I32, I64, PTR, VOID, Emitter, Task, const, vec
from awq.kernels.cpu.targets import LANES, Target

FIELDS = (
    "quantize_threads", "threads", "x", "y", "codes", "scales", "zeros", "bias", "planes", "steps", "sums",
    "tokens", "inputs", "outputs", "group", "chunk", "cached",
)  # fmt: skip
ROW, ROWS = 8, LANES  # activations per step; outputs per block
AHEAD = 4096  # bytes between what is read and what is fetched into the cache


def emit_quantize(module: ir.Module, element: ir.Type, planes: int) -> ir.Function:
    """quantize(task, i, n): rows of x [tokens, inputs] to planes int8 [tokens, planes, inputs], steps and sums [tokens, chunks]."""
    b, (task, index, count) = Emitter.define(module, "quantize", [PTR, I64, I64])
    t = Task(b, task, FIELDS)
    x, out, steps, sums, inputs, chunk = t.x, t.planes, t.steps, t.sums, t.inputs, t.chunk
    chunks = b.sdiv(inputs, chunk)
    limit, floats, ints = 127.0 * 256 ** (planes - 1), vec(F32, ROW), vec(I32, ROW)
    with b.loop(*b.part(t.tokens, index, count)) as token:
        first = b.mul(token, const(I64, planes))
        rows = [b.at(out, b.mul(b.add(first, const(I64, p)), inputs), I8) for p in range(planes)]
        row = b.at(x, b.mul(token, inputs), element)
        with b.loop(const(I64, 0), chunks) as c:
            start = b.mul(c, chunk)
            stop = b.add(start, chunk)
            most = b.variable(floats, const(floats, 0.0))
            with b.loop(start, stop, ROW) as k:
                value = b.to_float(b.fetch(row, k, element, ROW))
                b.store(b.math("maximum", b.get(most, floats), b.math("fabs", value)), most)
            largest = b.intrinsic("llvm.vector.reduce.fmaximum.v8f32", F32, [b.get(most, floats)])
            step = b.fdiv(largest, const(F32, limit))
            some = b.fcmp_unordered("!=", largest, const(F32, 0.0))
            factor = b.splat(b.select(some, b.fdiv(const(F32, limit), largest), const(F32, 0.0)), ROW)
            total = b.variable(ints, const(ints, 0))
            with b.loop(start, stop, ROW) as k:
                value = b.fmul(b.to_float(b.fetch(row, k, element, ROW)), factor)
                v = b.intrinsic("llvm.fptosi.sat.v8i32.v8f32", ints, [b.math("rint", value)])
                b.store(b.add(b.get(total, ints), v), total)
                for p in range(planes - 1, -1, -1):
                    byte = b.trunc(v, vec(I8, ROW))
                    b.put(byte, rows[p], k, I8)
                    v = b.ashr(b.sub(v, b.sext(byte, ints)), const(ints, 8))
            sum = b.intrinsic("llvm.vector.reduce.add.v8i32", I32, [b.get(total, ints)])
            place = b.add(b.mul(token, chunks), c)
            b.put(step, steps, place, F32)
            b.put(b.sitofp(sum, F32), sums, place, F32)
    b.ret_void()
    return b.function


def emit_tile(module: ir.Module, target: Target, element: ir.Type, planes: int, rows: int, tokens: int) -> ir.Function:
    """tile(task, block, token): `rows` blocks of 16 outputs from `block`, for `tokens` tokens from `token`."""
    b, (task, block, token) = Emitter.define(module, f"tile_{rows}x{tokens}", [PTR, I64, I64], internal=True)
    t = Task(b, task, FIELDS)
    inputs, outputs, group, chunk = t.inputs, t.outputs, t.group, t.chunk
    groups, chunks, chunks_per_group = b.sdiv(inputs, group), b.sdiv(inputs, chunk), b.sdiv(group, chunk)
    blocks = [b.add(block, const(I64, r)) for r in range(rows)]
    codes = [b.at(t.codes, b.mul(n, b.mul(inputs, const(I64, ROWS // 2))), I8) for n in blocks]
    grids = [b.mul(n, b.mul(groups, const(I64, ROWS))) for n in blocks]
    where = [b.add(token, const(I64, i)) for i in range(tokens)]
    data = [
        [b.at(t.planes, b.mul(b.add(b.mul(n, const(I64, planes)), const(I64, p)), inputs), I8) for p in range(planes)]
        for n in where
    ]
    steps, sums = ([b.at(base, b.mul(n, chunks), F32) for n in where] for base in (t.steps, t.sums))
    scales, zeros, ints, floats = t.scales, t.zeros, vec(I32), vec(F32)
    pairs = [(r, i) for r in range(rows) for i in range(tokens)]
    split = 2 if len(pairs) * planes <= 4 else 1  # more independent sums where few would wait for each other
    total = {pair: b.variable(floats, const(floats, 0.0)) for pair in pairs}
    acc = {(r, i, p, s): b.variable(ints, const(ints, 0)) for r, i in pairs for p in range(planes) for s in range(split)}
    with b.loop(const(I64, 0), groups) as g:
        place = [b.add(start, b.mul(g, const(I64, ROWS))) for start in grids]
        scale = [b.to_float(b.fetch(scales, n, F16, LANES)) for n in place]
        zero = [b.uitofp(b.fetch(zeros, n, I8, LANES), floats) for n in place]
        first = b.mul(g, chunks_per_group)
        with b.loop(first, b.add(first, chunks_per_group)) as c:
            for variable in acc.values():
                b.store(const(ints, 0), variable)
            start = b.mul(c, chunk)
            with b.loop(start, b.add(start, chunk), ROW) as k:
                for r in range(rows):
                    offset = b.mul(k, const(I64, ROWS // 2))
                    b.prefetch(codes[r], b.add(offset, const(I64, AHEAD)))
                    word = b.fetch(codes[r], offset, I8, 4 * LANES)
                    halves = (b.and_(word, const(word.type, 15)), b.lshr(word, const(word.type, 4)))
                    for i in range(tokens):
                        for p in range(planes):
                            for h, half in enumerate(halves):
                                four = b.load(b.at(data[i][p], b.add(k, const(I64, 4 * h)), I8), typ=I32, align=1)
                                place_ = acc[r, i, p, h % split]
                                values = b.bitcast(b.splat(four), vec(I8, 4 * LANES))
                                b.store(target.dot(b, b.get(place_, ints), half, values), place_)
            for i in range(tokens):
                step, sum = b.splat(b.fetch(steps[i], c, F32)), b.splat(b.fetch(sums[i], c, F32))
                for r in range(rows):
                    parts = []
                    for p in range(planes):
                        both = [b.get(acc[r, i, p, half], ints) for half in range(split)]
                        parts.append(b.sitofp(b.add(*both) if split == 2 else both[0], floats))
                    value = parts[0]
                    for part in parts[1:]:
                        value = b.math("fma", value, const(floats, 256.0), part)
                    value = b.math("fma", b.fneg(zero[r]), sum, value)
                    b.store(b.math("fma", value, b.fmul(scale[r], step), b.get(total[r, i], floats)), total[r, i])
    _store(b, t, element, blocks, where, total, outputs)
    b.ret_void()
    return b.function


def _store(b: Emitter, t: Task, element: ir.Type, blocks: list, where: list, total: dict, outputs: Any) -> None:
    lanes, floats = vec(I64), vec(F32)
    counting = ir.Constant(lanes, list(range(LANES)))
    for r, block in enumerate(blocks):
        n = b.mul(block, const(I64, ROWS))
        mask = b.icmp_signed("<", b.add(b.splat(n), counting), b.splat(outputs))
        kind = {F32: "f32", F16: "f16", I16: "i16"}[element]
        offset = b.variable(floats, const(floats, 0.0))
        with b.if_then(b.icmp_signed("!=", b.ptrtoint(t.bias, I64), const(I64, 0))):
            values = [b.at(t.bias, n, element), const(I32, 1), mask, const(vec(element), 0)]
            loaded = b.intrinsic(f"llvm.masked.load.v16{kind}.p0", vec(element), values)
            b.store(b.to_float(loaded), offset)
        for i, token in enumerate(where):
            value = b.from_float(b.fadd(b.get(total[r, i], floats), b.get(offset, floats)), element)
            place = b.at(t.y, b.add(b.mul(token, outputs), n), element)
            b.intrinsic(f"llvm.masked.store.v16{kind}.p0", VOID, [value, place, const(I32, 1), mask])


def emit_products(module: ir.Module, target: Target, element: ir.Type, planes: int) -> ir.Function:
    """products(task, i, n): the i-th of n parts of the outputs, all tokens; `cached` tokens at a time stay in a core's cache.

    One token takes one block of outputs after the other, which reads memory in one stream; more share what is unpacked.
    """
    widths = [w for w in (8, 4, 2, 1) if target.rows * w * planes <= target.sums]
    tiles = {(rows, w): emit_tile(module, target, element, planes, rows, w) for rows in {1, target.rows} for w in widths}
    b, (task, index, count) = Emitter.define(module, "products", [PTR, I64, I64])
    t = Task(b, task, FIELDS)
    tokens, cached = t.tokens, t.cached

    def whole(start: Any, stop: Any, step: int) -> Any:
        """The last place that steps from start reach without passing stop."""
        return b.add(start, b.mul(b.sdiv(b.sub(stop, start), const(I64, step)), const(I64, step)))

    def sweep(rows: int, first: Any, last: Any, begin: Any, end: Any) -> None:
        with b.loop(first, last, rows) as block:
            place = begin
            for width in widths:
                stop = whole(place, end, width)
                with b.loop(place, stop, width) as token:
                    b.call(tiles[rows, width], [task, block, token])
                place = stop

    first, last = b.part(b.sdiv(b.add(t.outputs, const(I64, LANES - 1)), const(I64, LANES)), index, count)
    middle = b.select(b.icmp_signed(">", tokens, const(I64, 1)), whole(first, last, target.rows), first)
    with b.loop(const(I64, 0), b.sdiv(b.add(tokens, b.sub(cached, const(I64, 1))), cached)) as piece:
        begin = b.mul(piece, cached)
        end = b.add(begin, cached)
        end = b.select(b.icmp_signed("<", end, tokens), end, tokens)
        if target.rows > 1:
            sweep(target.rows, first, middle, begin, end)
        sweep(1, middle if target.rows > 1 else first, last, begin, end)
    b.ret_void()
    return b.function


def emit_linear(module: ir.Module, element: ir.Type, target: Target, planes: int) -> list[ir.Function]:
    """The two parts of a product, one after the other."""
    return [emit_quantize(module, element, planes), emit_products(module, target, element, planes)]
