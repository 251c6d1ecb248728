"""Products of nibbles and integers on matrix units (AMX): tiles of 16 tokens × 16 outputs.

A tile of weights holds codes less their zero point, one byte each: those of an item are unpacked
once for all of its tokens. A tile of activations is one digit of 16 tokens, as it lies in memory.
The unit adds up a group of inputs in int32, exactly; then vectors put the digits together and
apply the group's scale and the token's step, while the unit works on the next group.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from llvmlite import ir

from awq.kernels.cpu.emit import Emitter
from awq.kernels.cpu.encoder.operands import BLOCK, PAIR, Operands, Product, joined_digits
from awq.kernels.cpu.encoder.phase import Phase
from awq.kernels.cpu.ir_types import F16, F32, I8, I32, I64, LANES, PTR, VOID, vec
from awq.kernels.cpu.values import Pointer, Value
from awq.native.spec import EncoderSpec

TOKENS = 16  # of a tile
MAX_DEPTH = 64  # inputs of a tile
SLAB_INPUTS = 512  # that are unpacked at a time; at least a group
SLAB_BYTES = SLAB_INPUTS * PAIR  # of the scratch memory, before sums of two groups
LINE = 64  # bytes of a row of a tile
FIRST_ACTIVATIONS = 3  # tiles before it are sums, one for each digit
WEIGHTS = (6, 7)
REPEATED = 0x01010101  # a byte times this fills an int32


def depth_of(group: int) -> int:
    """Inputs of a tile: the largest part of a group that is a multiple of 16, up to 64."""
    return max(d for d in range(16, MAX_DEPTH + 1, 16) if group % d == 0)


class MatrixProducts:
    """The products of a program."""

    piece_tokens = 128  # that share weights unpacked once

    def __init__(self, module: ir.Module, spec: EncoderSpec) -> None:
        self._unpack = _emit_unpack(module, spec)
        self._tile = _emit_tile(module, spec)
        self._settings = _settings(module, spec)

    def begin(self, b: Emitter) -> None:
        """Sets the calling thread's unit up."""
        b.builder.call(b.declared("llvm.x86.ldtilecfg", VOID, [PTR]), [self._settings])

    def end(self, b: Emitter) -> None:
        """Leaves the unit, so that the system need not keep its state."""
        b.builder.call(b.declared("llvm.x86.tilerelease", VOID, []), [])

    def item(self, p: Phase, index: Value, product: Product) -> None:
        """y [tokens, outputs] of 32 outputs, of 16 at the end of an odd number of blocks; a slab of
        inputs at a time, so that what tiles read again lies in the nearest cache."""
        b = p.b
        operands = Operands.of_item(p, index, product, self.piece_tokens)
        left = operands.pair * -2 + product.outputs // BLOCK
        blocks = b.smaller(left, b.const(I64, 2))
        groups = product.inputs // p.spec.group
        step = max(1, SLAB_INPUTS // p.spec.group)

        for first in range(0, groups, step):
            last = min(first + step, groups)
            slab = _Slab(first, last - first)
            self._unpack_slab(p, operands, product, slab, blocks)
            tokens = b.loop(operands.begin, operands.end, TOKENS)
            with tokens as token, b.loop(0, blocks) as r:
                self._multiply(p, operands, product, slab, token, r)

    def _unpack_slab(
        self,
        p: Phase,
        operands: Operands,
        product: Product,
        slab: _Slab,
        blocks: Value,
    ) -> None:
        """Also fetches what is unpacked next: the next slab's codes, or the next item's; worker 0
        takes items upwards."""
        b = p.b
        inputs = product.inputs
        group = p.spec.group
        grid = inputs // group * BLOCK
        codes_of_group = group * BLOCK // 2
        distance = b.const(I64, slab.groups * codes_of_group)

        if slab.first + slab.groups == inputs // group:
            back = -slab.first * codes_of_group
            pair = inputs * BLOCK
            up = b.const(I64, back + pair)
            down = b.const(I64, back - pair)
            distance = b.select(p.worker.equals(0), up, down)

        with b.loop(0, blocks) as r:
            codes = operands.codes + (r * (inputs * BLOCK // 2) + slab.first * codes_of_group)
            zeros = operands.zeros + (r * grid + slab.first * BLOCK)
            panel = _scratch(p) + r * (slab.groups * group * BLOCK)
            ahead = codes + distance
            groups = b.const(I64, slab.groups)
            b.call(self._unpack, [codes, zeros, panel, ahead, groups])

    def _multiply(
        self,
        p: Phase,
        operands: Operands,
        product: Product,
        slab: _Slab,
        token: Value,
        r: Value,
    ) -> None:
        b = p.b
        inputs = product.inputs
        outputs = product.outputs
        group = p.spec.group
        groups = inputs // group
        y = operands.y + (token * outputs + r * BLOCK)
        bias = operands.bias + r * BLOCK
        pointers = [
            _scratch(p) + r * (slab.groups * group * BLOCK),
            operands.scales + (r * (groups * BLOCK) + slab.first * BLOCK),
            bias if slab.first == 0 else y,
            p.t.planes + (token * (inputs * p.spec.planes) + slab.first * group),
            p.t.steps + (token * groups + slab.first),
            y,
            _scratch(p) + SLAB_BYTES,
        ]
        sizes = (slab.groups, groups, 0 if slab.first == 0 else outputs, outputs)
        b.call(self._tile, [*pointers, *(b.const(I64, size) for size in sizes)])


class _Slab(NamedTuple):
    """Groups of inputs that are unpacked together."""

    first: int
    groups: int


def _scratch(p: Phase) -> Pointer:
    return p.b.as_type(p.t.scratch + p.worker * p.t.scratch_values, I8)


def _settings(module: ir.Module, spec: EncoderSpec) -> ir.GlobalVariable:
    """The argument of ldtilecfg: rows and bytes of a row of each tile."""
    depth = depth_of(spec.group)
    sums = (TOKENS, LINE)
    activations = (TOKENS, depth)
    weights = (depth // 4, LINE)
    shapes = [sums] * 3 + [activations] * 3 + [weights] * 2
    rows, widths = zip(*shapes)
    packed = struct.pack("<BB14x8H16x8B8x", 1, 0, *widths, *rows)
    data = ir.Constant(ir.ArrayType(I8, len(packed)), bytearray(packed))
    found = ir.GlobalVariable(module, data.type, "tiles")
    found.initializer = data
    found.global_constant = True
    found.align = LINE
    found.linkage = "internal"

    return found


def _emit_unpack(module: ir.Module, spec: EncoderSpec) -> ir.Function:
    """unpack(codes, zeros, panel, ahead, groups): groups of a block of 16 outputs as int8
    [inputs / 4, 16, 4] of code − zero. As much from `ahead` on is fetched into the cache."""
    b, (codes, zeros, panel, ahead, groups) = Emitter.define(
        module, "unpack", [PTR, PTR, PTR, PTR, I64], internal=True
    )
    places = (codes, zeros, panel, ahead)
    codes, zeros, panel, ahead = (b.as_type(place, I8) for place in places)
    with b.loop(0, groups) as g:
        zero = b.zext(zeros.vector(g * BLOCK, LANES), vec(I32)) * REPEATED
        offset = b.bitcast(zero, vec(I8, 4 * LANES))
        start = g * spec.group
        with b.loop(start, start + spec.group, 8) as k:
            line = k * (BLOCK // 2)
            b.prefetch(ahead + line)
            word = codes.vector(line, 4 * LANES)
            out = panel + k * BLOCK
            out[0] = (word & 15) - offset
            out[LINE] = word.shift_right(4) - offset

    return b.finish()


def _emit_tile(module: ir.Module, spec: EncoderSpec) -> ir.Function:
    """tile(panel, scales, start, planes, steps, y, sums, groups, row_groups, start_stride,
    outputs): 16 tokens × 16 outputs: y = start + product.

    Every pointer is that of the first token, output and group. Rows of `start` lie `start_stride`
    numbers apart, those of y `outputs`; a token has `row_groups` groups in all. What lies in memory
    behind the last token is computed too.
    """
    b, arguments = Emitter.define(module, "tile", [PTR] * 7 + [I64] * 4, internal=True)
    panel, scales, start, planes, steps, y, sums = (
        b.as_type(pointer, kind)
        for pointer, kind in zip(arguments, (I8, F16, F32, I8, F32, F32, I32))
    )
    groups, row_groups, start_stride, outputs = arguments[7:]
    inputs = row_groups * spec.group
    totals = [b.variable(vec(F32), start.vector(start_stride * i, LANES)) for i in range(TOKENS)]

    def sums_of(g: Value) -> Pointer:
        return sums + (g & 1) * (spec.planes * TOKENS * LANES)

    def add(g: Value) -> None:
        scale = b.to_float(scales.vector(g * BLOCK, LANES))
        for i, total in enumerate(totals):
            lines = [sums_of(g) + (p * TOKENS + i) * LANES for p in range(spec.planes)]
            whole = joined_digits(b, [line.vector(0, LANES) for line in lines])
            value = whole * b.splat(steps[row_groups * i + g])
            total.value = b.fma(value, scale, total.value)

    _multiply(b, spec, panel, planes, sums, b.const(I64, 0), inputs)
    # One group behind: what the unit stores is quick to load only after it has reached the cache.
    with b.loop(1, groups) as g:
        _multiply(b, spec, panel, planes, sums_of(g), g, inputs)
        add(g - 1)

    add(groups - 1)
    for i, total in enumerate(totals):
        y[outputs * i] = total.value
    return b.finish()


def _multiply(
    b: Emitter,
    spec: EncoderSpec,
    panel: Pointer,
    planes: Pointer,
    sums: Pointer,
    g: Value,
    inputs: Value,
) -> None:
    """sums int32 [planes, 16, 16] of one group."""
    depth = depth_of(spec.group)
    stride = inputs * spec.planes
    line = b.const(I64, LINE)
    for p in range(spec.planes):
        _tile_call(b, "tilezero", p)
    for step in range(spec.group // depth):
        k = g * spec.group + step * depth
        weights = WEIGHTS[step % 2]
        _tile_call(b, "tileloadd64", weights, panel + k * BLOCK, line)

        for p in range(spec.planes):
            activations = FIRST_ACTIVATIONS + p
            _tile_call(b, "tileloadd64", activations, planes + (inputs * p + k), stride)
            _tile_call(b, "tdpbssd", p, activations, weights)

    for p in range(spec.planes):
        _tile_call(b, "tilestored64", p, sums + p * TOKENS * LANES, line)


def _tile_call(b: Emitter, name: str, *arguments: int | Pointer | Value) -> None:
    """One of the unit's instructions; numbers name tiles."""
    operands = [b.const(I8, a) if isinstance(a, int) else a for a in arguments]
    b.intrinsic(f"llvm.x86.{name}", VOID, operands)
