"""Products of nibbles and integers on vectors: tiles of blocks of 16 outputs and a few tokens."""

from __future__ import annotations

from llvmlite import ir

from awq.kernels.cpu.emit import Emitter
from awq.kernels.cpu.encoder.operands import BLOCK, PAIR, Operands, Product, joined_digits
from awq.kernels.cpu.encoder.phase import Phase
from awq.kernels.cpu.ir_types import F16, F32, I8, I32, I64, LANES, PTR, vec
from awq.kernels.cpu.targets import Target
from awq.kernels.cpu.values import Value, Variable
from awq.native.spec import EncoderSpec


class VectorProducts:
    """The products of a program, with the tiles that fit the registers."""

    piece_tokens = 64  # that share one pass over a pair of blocks

    def __init__(self, module: ir.Module, target: Target, spec: EncoderSpec) -> None:
        self._widths = [w for w in (8, 4, 2) if 2 * w * spec.planes <= target.sums] + [1]
        self._tiles = {
            (rows, width): _emit_tile(module, target, spec, rows, width)
            for rows in (2, 1)
            for width in self._widths
        }

    def item(self, p: Phase, index: Value, product: Product) -> None:
        """y [tokens, outputs] of 32 outputs."""
        operands = Operands.of_item(p, index, product, self.piece_tokens)
        if product.outputs % PAIR == 0:
            self._sweep(p, product, operands, 2)
            return
        with p.b.builder.if_else((operands.pair < product.pairs - 1).ir) as (whole, last):
            with whole:
                self._sweep(p, product, operands, 2)
            with last:
                self._sweep(p, product, operands, 1)

    def _sweep(self, p: Phase, product: Product, operands: Operands, rows: int) -> None:
        b = p.b
        inputs = product.inputs
        outputs = product.outputs
        groups = inputs // p.spec.group
        planes = p.t.planes
        steps = p.t.steps
        sums = p.t.sums
        place = operands.begin

        for width in self._widths:
            stop = place + (operands.end - place) // width * width
            with b.loop(place, stop, width) as token:
                pointers = [
                    operands.codes,
                    operands.scales,
                    operands.zeros,
                    operands.bias,
                    planes + token * (inputs * p.spec.planes),
                    steps + token * groups,
                    sums + token * groups,
                    operands.y + token * outputs,
                ]
                sizes = [b.const(I64, inputs), b.const(I64, outputs)]
                b.call(self._tiles[rows, width], [*pointers, *sizes])

            place = stop


def _emit_tile(
    module: ir.Module,
    target: Target,
    spec: EncoderSpec,
    rows: int,
    tokens: int,
) -> ir.Function:
    """tile(codes, scales, zeros, bias, planes, steps, sums, y, inputs, outputs): `rows` blocks ×
    `tokens` tokens.

    Every pointer is that of the first block or token. Inputs are a multiple of the group.
    """
    name = f"tile_{rows}x{tokens}"
    group = spec.group
    planes = spec.planes
    b, arguments = Emitter.define(module, name, [PTR] * 8 + [I64, I64], internal=True)
    codes, scales, zeros, bias, data, steps, sums, y = (
        b.as_type(pointer, kind)
        for pointer, kind in zip(arguments, (I8, F16, I8, F32, I8, F32, F32, F32))
    )
    inputs, outputs = arguments[8:]
    groups = inputs // group
    lines = [codes + inputs * (r * BLOCK // 2) for r in range(rows)]
    digits = [[data + inputs * (i * planes + p) for p in range(planes)] for i in range(tokens)]

    totals: dict[tuple[int, int], Variable] = {}
    integers: dict[tuple[int, int, int], Variable] = {}
    for r in range(rows):
        offset = bias.vector(r * BLOCK, LANES)
        for i in range(tokens):
            totals[r, i] = b.variable(vec(F32), offset)
            for p in range(planes):
                integers[r, i, p] = b.variable(vec(I32), 0)

    with b.loop(0, groups) as g:
        grids = [(groups * r + g) * BLOCK for r in range(rows)]
        for variable in integers.values():
            variable.value = b.const(vec(I32), 0)
        start = g * group
        with b.loop(start, start + group, 8) as k:
            for r in range(rows):
                word = lines[r].vector(k * (BLOCK // 2), 4 * LANES)
                for half, nibbles in enumerate((word & 15, word.shift_right(4))):
                    for i in range(tokens):
                        for p in range(planes):
                            four = (digits[i][p] + (k + 4 * half)).load_as(I32)
                            values = b.bitcast(b.splat(four), vec(I8, 4 * LANES))
                            place = integers[r, i, p]
                            place.value = target.dot(b, place.value, nibbles, values)

        for r in range(rows):
            scale = b.to_float(scales.vector(grids[r], LANES))
            zero = b.unsigned_to_float(zeros.vector(grids[r], LANES), vec(F32))
            for i in range(tokens):
                place = groups * i + g
                step = b.splat(steps[place])
                sum = b.splat(sums[place])
                whole = joined_digits(b, [integers[r, i, p].value for p in range(planes)])
                value = b.fma(-zero, sum, whole)
                totals[r, i].value = b.fma(value, scale * step, totals[r, i].value)

    for (r, i), total in totals.items():
        (y + outputs * i)[r * BLOCK] = total.value
    return b.finish()
