"""Products of nibbles and integers on vectors: tiles of blocks of 16 outputs and a few tokens."""

from __future__ import annotations

from llvmlite import ir

from awq.kernels.cpu.emit import Emitter
from awq.kernels.cpu.encoder.operands import BLOCK, PAIR, Operands, Product, joined_digits
from awq.kernels.cpu.encoder.phase import Phase
from awq.kernels.cpu.ir_types import F16, F32, I8, I32, I64, LANES, PTR, vec
from awq.kernels.cpu.targets import Target
from awq.kernels.cpu.values import Pointer, Value, Variable
from awq.native.spec import EncoderSpec

WIDTHS = (16, 8, 4, 2, 1)  # tokens of a tile


class VectorProducts:
    """The products of a program, with the tiles that fit the registers."""

    def __init__(self, module: ir.Module, target: Target, spec: EncoderSpec) -> None:
        most = max(1, target.sums // spec.planes)  # of a tile's tokens, for one block
        self._rows = {}
        self._tiles = {}

        for width in WIDTHS:
            if width > most:
                continue

            # one token alone has too few sums to keep the unit busy
            is_narrow = 2 * width <= most or width == 1
            self._rows[width] = 2 if is_narrow else 1

            for rows in range(1, self._rows[width] + 1):
                tile = _emit_tile(module, target, spec, rows, width)
                self._tiles[rows, width] = tile

    def item(self, p: Phase, index: Value, product: Product) -> None:
        """y [tokens, outputs] of 32 outputs."""
        operands = Operands.of_item(p, index, product, p.t.piece_tokens)
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
        sizes = [b.const(I64, product.inputs), b.const(I64, product.outputs)]
        place = operands.begin

        for width, most in self._rows.items():
            stop = place + (operands.end - place) // width * width
            own_rows = min(rows, most)
            tile = self._tiles[own_rows, width]

            for block in range(0, rows, own_rows):
                with b.loop(place, stop, width) as token:
                    b.call(tile, [*_places(p, product, operands, block, token), *sizes])

            place = stop


def _places(
    p: Phase,
    product: Product,
    operands: Operands,
    block: int,
    token: Value,
) -> list[Pointer]:
    """What a tile of an item's blocks from `block` on is given for tokens from `token` on."""
    inputs = product.inputs
    grid = inputs // p.spec.group * BLOCK
    groups = token * p.spec.row_groups(inputs)

    return [
        operands.codes + block * (inputs * BLOCK // 2),
        operands.scales + block * grid,
        operands.zeros + block * grid,
        operands.bias + block * BLOCK,
        p.t.planes + token * p.spec.row_bytes(inputs),
        p.t.steps + groups,
        p.t.sums + groups,
        operands.y + (token * product.outputs + block * BLOCK),
    ]


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
    lowest = [data + inputs * p for p in range(planes)]
    row = spec.row_bytes(spec.widest)
    row_groups = spec.row_groups(spec.widest)

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
                            four = (lowest[p] + k + (row * i + 4 * half)).load_as(I32)
                            values = b.bitcast(b.splat(four), vec(I8, 4 * LANES))
                            place = integers[r, i, p]
                            place.value = target.dot(b, place.value, nibbles, values)

        for r in range(rows):
            scale = b.to_float(scales.vector(grids[r], LANES))
            zero = b.unsigned_to_float(zeros.vector(grids[r], LANES), vec(F32))
            for i in range(tokens):
                own_group = g + row_groups * i
                step = b.splat(steps[own_group])
                sum = b.splat(sums[own_group])
                whole = joined_digits(b, [integers[r, i, p].value for p in range(planes)])
                value = b.fma(-zero, sum, whole)
                totals[r, i].value = b.fma(value, scale * step, totals[r, i].value)

    for (r, i), total in totals.items():
        (y + outputs * i)[r * BLOCK] = total.value
    return b.finish()
