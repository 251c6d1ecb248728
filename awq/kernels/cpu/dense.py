"""Many tokens in bfloat16 on CPUs with matrix units (AMX): the weight is made dense, some rows at a
time, for torch's own product.

Those units multiply bfloat16 several times as fast as vectors multiply bytes, and know no nibbles.
The dense weight is rounded to bfloat16, which moves a product by 0.1 %, as rounding it to bfloat16
does anyway.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from llvmlite import ir
from torch import Tensor

from awq.kernels.cpu.emit import Emitter
from awq.kernels.cpu.engine import program
from awq.kernels.cpu.ir_types import F16, F32, I8, I32, vec
from awq.kernels.cpu.pool import team_size
from awq.kernels.cpu.targets import LANES as ROWS
from awq.kernels.cpu.task import COUNT, ELEMENT, Array, Task
from awq.kernels.packed import Packed

DEPTH = 8  # inputs per step
LOW_NIBBLES = 0x0F0F0F0F
MAX_DENSE_VALUES = 1 << 22  # of the weight at a time

DEQUANTIZE = Task(
    threads=COUNT,
    y=Array(ELEMENT),
    codes=Array(I8),
    scales=Array(F16),
    zeros=Array(I8),
    blocks=COUNT,
    outputs=COUNT,
    inputs=COUNT,
    group=COUNT,
)


def linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x [..., in], bfloat16 → [..., out]."""
    inputs, outputs, _ = packed.shape
    rows = x.reshape(-1, inputs)
    if bias is not None:
        bias = bias.to(x.dtype)

    blocks = MAX_DENSE_VALUES // inputs // ROWS
    step = max(1, blocks) * ROWS

    parts = []
    for first in range(0, outputs, step):
        last = min(first + step, outputs)
        weight = dequantized(packed, first, last)
        own_bias = None if bias is None else bias[first:last]
        parts.append(F.linear(rows, weight, own_bias))

    out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return out.view(*x.shape[:-1], outputs)


def dequantized(packed: Packed, start: int, stop: int) -> Tensor:
    """Rows start … stop of the weight, bfloat16 [rows, in]; start is a multiple of 16."""
    inputs, _, group = packed.shape
    rows = stop - start
    dense = torch.empty(rows, inputs, dtype=torch.bfloat16)
    first = start // ROWS
    task = DEQUANTIZE.pack(
        threads=team_size(),
        y=dense,
        codes=packed.qweight[first:],
        scales=packed.scales[first:],
        zeros=packed.qzeros[first:],
        blocks=-(-rows // ROWS),
        outputs=rows,
        inputs=inputs,
        group=group,
    )
    program(emit_dequantize, torch.bfloat16)(task)

    return dense


def emit_dequantize(module: ir.Module, element: ir.Type) -> list[ir.Function]:
    """dequantize(task, i, n): the i-th of n parts of the blocks of 16 rows, from layout rows16 to y
    [outputs, inputs].

    y = (codes - zeros) * scales
    """
    b, task, index, count = Emitter.define_part(module, "dequantize")
    t = DEQUANTIZE.reader(b, task, element)
    y = t.y
    codes = t.codes
    scales = t.scales
    zeros = t.zeros
    outputs = t.outputs
    inputs = t.inputs
    group = t.group
    groups = inputs // group

    with b.loop(*b.part(t.blocks, index, count)) as block:
        first = block * ROWS
        left = outputs - first
        rows = b.select(left < ROWS, left, ROWS)
        lines = codes + first * (inputs // 2)

        with b.loop(0, rows) as r:
            own = lines + r * 4
            out = y + (first + r) * inputs
            with b.loop(0, groups) as g:
                place = (block * groups + g) * ROWS + r
                scale = b.splat(b.half_to_float(scales.load(place, align=2)), DEPTH)
                zero = b.splat(b.unsigned_to_float(zeros[place], F32), DEPTH)
                start = g * group

                with b.loop(start, start + group, DEPTH) as k:
                    four = (own + k * 8).load_as(I32, align=4)
                    halves = (four & LOW_NIBBLES, four.shift_right(4) & LOW_NIBBLES)
                    codes_of_row = b.joined([b.bitcast(half, vec(I8, 4)) for half in halves])
                    steps = b.unsigned_to_float(codes_of_row, vec(F32, DEPTH))
                    out.put_floats(k, (steps - zero) * scale)

    return [b.finish()]
