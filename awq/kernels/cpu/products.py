"""The CPU kernels, as LLVM IR: activations to bytes, then products of nibbles and bytes.

A row of activations is cut into chunks (a group of the weight, or a part of one). A chunk becomes
integers v = x / step, which are the digits of a number to the base 256, one int8 for each plane:
|v| is at most 127, 127 · 256 or 127 · 256². For a chunk

    Σ (q − z) · s · x  =  s · step · (Σ q · v − z · Σ v)

where the sum over one plane is exact in int32, and planes are put together in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llvmlite import ir

from awq.kernels.cpu.emit import Emitter
from awq.kernels.cpu.ir_types import F16, F32, I8, I16, I32, I64, LANES, PTR, VOID, vec
from awq.kernels.cpu.targets import Target
from awq.kernels.cpu.task import COUNT, ELEMENT, Array, Reader, Task
from awq.kernels.cpu.values import Number, Pointer, Value, Variable

PRODUCT = Task(
    quantize_threads=COUNT,
    threads=COUNT,
    x=Array(ELEMENT),
    y=Array(ELEMENT),
    codes=Array(I8),
    scales=Array(F16),
    zeros=Array(I8),
    bias=Array(ELEMENT),
    planes=Array(I8),
    steps=Array(F32),
    sums=Array(F32),
    tokens=COUNT,
    inputs=COUNT,
    outputs=COUNT,
    group=COUNT,
    chunk=COUNT,
    cached=COUNT,
)
DEPTH = 8  # inputs per step
ROWS = LANES  # outputs per block
PREFETCH_BYTES = 4096  # between what is read and what is fetched into the cache


def emit_quantize(module: ir.Module, element: ir.Type, planes: int) -> ir.Function:
    """quantize(task, i, n): rows of x [tokens, inputs] to planes int8 [tokens, planes, inputs],
    steps and sums [tokens, chunks].

    For one plane: step = x.abs().amax(-1) / 127; planes = (x / step).round(); sums =
    planes.sum(-1), by chunks of a row.
    """
    b, task, index, count = Emitter.define_part(module, "quantize")
    t = PRODUCT.reader(b, task, element)
    x = t.x
    out = t.planes
    steps = t.steps
    sums = t.sums
    inputs = t.inputs
    chunk = t.chunk
    chunks = inputs // chunk
    limit = 127.0 * 256 ** (planes - 1)
    floats = vec(F32, DEPTH)
    ints = vec(I32, DEPTH)

    with b.loop(*b.part(t.tokens, index, count)) as token:
        first = token * planes
        rows = [out + (first + p) * inputs for p in range(planes)]
        row = x + token * inputs
        with b.loop(0, chunks) as c:
            start = c * chunk
            stop = start + chunk
            most = b.variable(floats, 0.0)
            with b.loop(start, stop, DEPTH) as k:
                value = row.floats(k, DEPTH)
                most.value = b.maximum(most.value, b.math("fabs", value))

            largest = b.intrinsic("llvm.vector.reduce.fmaximum.v8f32", F32, [most.value])
            step = largest / limit
            factor = b.splat(b.select(largest.differs(0.0), limit / largest, 0.0), DEPTH)
            total = b.variable(ints, 0)

            with b.loop(start, stop, DEPTH) as k:
                v = b.round_to_int(row.floats(k, DEPTH) * factor)
                total.value = total.value + v
                for p in range(planes - 1, -1, -1):
                    byte = b.trunc(v, vec(I8, DEPTH))
                    rows[p][k] = byte
                    v = (v - b.sext(byte, ints)) >> 8

            sum = b.intrinsic("llvm.vector.reduce.add.v8i32", I32, [total.value])
            place = token * chunks + c
            steps[place] = step
            sums[place] = b.signed_to_float(sum, F32)

    return b.finish()


class _Tile(NamedTuple):
    """What a tile computes: `rows` blocks of 16 outputs × `tokens` tokens, with activations in
    `planes`.

    split: independent sums per output, where few sums would wait for each other.
    """

    rows: int
    tokens: int
    planes: int

    @property
    def split(self) -> int:
        return 2 if self.rows * self.tokens * self.planes <= 4 else 1

    def pairs(self) -> list[tuple[int, int]]:
        return [(r, i) for r in range(self.rows) for i in range(self.tokens)]

    def sums(self) -> list[tuple[int, int, int, int]]:
        """(row block, token, plane, half) of every sum of integers."""
        return [
            (r, i, p, s)
            for r, i in self.pairs()
            for p in range(self.planes)
            for s in range(self.split)
        ]


def emit_tile(module: ir.Module, target: Target, element: ir.Type, tile: _Tile) -> ir.Function:
    """tile(task, block, token): `rows` blocks of 16 outputs from `block`, for `tokens` tokens from
    `token`."""
    name = f"tile_{tile.rows}x{tile.tokens}"
    b, (task, block, token) = Emitter.define(module, name, [PTR, I64, I64], internal=True)
    t = PRODUCT.reader(b, task, element)
    inputs = t.inputs
    outputs = t.outputs
    group = t.group
    chunk = t.chunk
    groups = inputs // group
    chunks = inputs // chunk
    chunks_per_group = group // chunk
    blocks = [block + r for r in range(tile.rows)]
    codes = [t.codes + n * (inputs * (ROWS // 2)) for n in blocks]
    grids = [n * (groups * ROWS) for n in blocks]
    tokens = [token + i for i in range(tile.tokens)]
    planes = [
        [t.planes + (n * tile.planes + p) * inputs for p in range(tile.planes)] for n in tokens
    ]
    all_steps = t.steps
    all_sums = t.sums
    steps = [all_steps + n * chunks for n in tokens]
    sums = [all_sums + n * chunks for n in tokens]
    scales = t.scales
    zeros = t.zeros
    totals = {pair: b.variable(vec(F32), 0.0) for pair in tile.pairs()}
    integers = {key: b.variable(vec(I32), 0) for key in tile.sums()}

    with b.loop(0, groups) as g:
        places = [start + g * ROWS for start in grids]
        scale = [b.to_float(scales.vector(n, LANES)) for n in places]
        zero = [b.unsigned_to_float(zeros.vector(n, LANES), vec(F32)) for n in places]
        first = g * chunks_per_group

        with b.loop(first, first + chunks_per_group) as c:
            for variable in integers.values():
                variable.value = b.const(vec(I32), 0)
            start = c * chunk
            with b.loop(start, start + chunk, DEPTH) as k:
                _add_products(b, target, tile, k, codes, planes, integers)
            for i in range(tile.tokens):
                step = b.splat(steps[i][c])
                sum = b.splat(sums[i][c])
                for r in range(tile.rows):
                    value = _combined(b, tile, r, i, integers)
                    value = b.fma(-zero[r], sum, value)
                    total = totals[r, i]
                    factor = scale[r] * step
                    total.value = b.fma(value, factor, total.value)

    _store(b, t, element, blocks, tokens, totals, outputs)
    return b.finish()


def _add_products(
    b: Emitter,
    target: Target,
    tile: _Tile,
    k: Value,
    codes: Sequence[Pointer],
    planes: Sequence[Sequence[Pointer]],
    integers: dict[tuple[int, int, int, int], Variable],
) -> None:
    """Adds the products of eight inputs from k on to the integer sums."""
    for r in range(tile.rows):
        offset = k * (ROWS // 2)
        b.prefetch(codes[r] + (offset + PREFETCH_BYTES))
        word = codes[r].vector(offset, 4 * LANES)
        halves = (word & 15, word.shift_right(4))

        for i in range(tile.tokens):
            for p in range(tile.planes):
                for h, half in enumerate(halves):
                    four = (planes[i][p] + (k + 4 * h)).load_as(I32)
                    place = integers[r, i, p, h % tile.split]
                    values = b.bitcast(b.splat(four), vec(I8, 4 * LANES))
                    place.value = target.dot(b, place.value, half, values)


def _combined(
    b: Emitter,
    tile: _Tile,
    r: int,
    i: int,
    integers: dict[tuple[int, int, int, int], Variable],
) -> Value:
    """The digits of one sum put together, as float32."""
    parts = []
    for p in range(tile.planes):
        halves = [integers[r, i, p, s].value for s in range(tile.split)]
        whole = halves[0] + halves[1] if tile.split == 2 else halves[0]
        parts.append(b.signed_to_float(whole, vec(F32)))

    value = parts[0]
    for part in parts[1:]:
        value = b.fma(value, b.const(vec(F32), 256.0), part)
    return value


def _store(
    b: Emitter,
    t: Reader,
    element: ir.Type,
    blocks: Sequence[Value],
    tokens: Sequence[Value],
    totals: dict[tuple[int, int], Variable],
    outputs: Value,
) -> None:
    """Writes the sums plus the bias; outputs beyond the last one are masked."""
    counting = Value(b, ir.Constant(vec(I64), list(range(LANES))))
    for r, block in enumerate(blocks):
        n = block * ROWS
        mask = b.splat(n) + counting < b.splat(outputs)
        kind = {F32: "f32", F16: "f16", I16: "i16"}[element]
        align = b.const(I32, 1)
        offset = b.variable(vec(F32), 0.0)

        with b.when(t.bias.is_given()):
            operands = [t.bias + n, align, mask, b.const(vec(element), 0)]
            loaded = b.intrinsic(f"llvm.masked.load.v16{kind}.p0", vec(element), operands)
            offset.value = b.to_float(loaded)

        for i, token in enumerate(tokens):
            value = b.from_float(totals[r, i].value + offset.value, element)
            place = t.y + (token * outputs + n)
            b.intrinsic(f"llvm.masked.store.v16{kind}.p0", VOID, [value, place, align, mask])


def emit_products(module: ir.Module, target: Target, element: ir.Type, planes: int) -> ir.Function:
    """products(task, i, n): the i-th of n parts of the outputs, all tokens; `cached` tokens at a
    time stay in a core's cache.

    y = x @ ((codes - zeros) * scales).T + bias. One token takes one block of outputs after the
    other, which reads memory in one stream; more share what is unpacked.
    """
    widths = [w for w in (8, 4, 2, 1) if target.rows * w * planes <= target.sums]
    tiles = {}
    for rows in {1, target.rows}:
        for width in widths:
            tiles[rows, width] = emit_tile(module, target, element, _Tile(rows, width, planes))

    b, task, index, count = Emitter.define_part(module, "products")
    t = PRODUCT.reader(b, task, element)
    tokens = t.tokens
    cached = t.cached

    def whole(start: Value, stop: Value, step: int) -> Value:
        """The last place that steps from start reach without passing stop."""
        return start + (stop - start) // step * step

    def sweep(rows: int, first: Number, last: Number, begin: Value, end: Value) -> None:
        with b.loop(first, last, rows) as block:
            place = begin
            for width in widths:
                stop = whole(place, end, width)
                with b.loop(place, stop, width) as token:
                    b.call(tiles[rows, width], [task, block, token])
                place = stop

    blocks = (t.outputs + (LANES - 1)) // LANES
    first, last = b.part(blocks, index, count)
    middle = b.select(tokens > 1, whole(first, last, target.rows), first)
    with b.loop(0, (tokens + (cached - 1)) // cached) as piece:
        begin = piece * cached
        end = begin + cached
        end = b.select(end < tokens, end, tokens)
        if target.rows > 1:
            sweep(target.rows, first, middle, begin, end)

        sweep(1, middle if target.rows > 1 else first, last, begin, end)

    return b.finish()


def emit_linear(
    module: ir.Module,
    element: ir.Type,
    target: Target,
    planes: int,
) -> list[ir.Function]:
    """The two parts of a product, one after the other."""
    return [emit_quantize(module, element, planes), emit_products(module, target, element, planes)]
