"""Many tokens in bfloat16 on CPUs with matrix units (AMX): the weight is made dense, some rows at a time, for torch's own product.

Those units multiply bfloat16 several times as fast as vectors multiply bytes, and know no nibbles. The dense weight is rounded to
bfloat16, which moves a product by 0.1 %, as rounding it to bfloat16 does anyway.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from llvmlite import ir
from torch import Tensor

from awq.kernels.cpu.emit import F16, F32, I8, I32, I64, PTR, Emitter, Task, const, vec
from awq.kernels.cpu.engine import program
from awq.kernels.cpu.targets import LANES as ROWS
from awq.kernels.packed import Packed

_DEPTH = 8  # inputs in a step
_PIECE = 1 << 22  # weights that are dense at a time
_FIELDS = ("threads", "y", "codes", "scales", "zeros", "rows", "outputs", "inputs", "group")
_Task = ctypes.c_int64 * len(_FIELDS)


def linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x [..., in], bfloat16 → [..., out]."""
    shape, rows = packed.shape, x.reshape(-1, packed.shape.in_features)
    step = max(ROWS, _PIECE // shape.in_features // ROWS * ROWS)
    bias = None if bias is None else bias.to(x.dtype)
    parts = []
    for first in range(0, shape.out_features, step):
        part = slice(first, min(first + step, shape.out_features))
        parts.append(F.linear(rows, dequantized(packed, part.start, part.stop), None if bias is None else bias[part]))
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return out.view(*x.shape[:-1], shape.out_features)


def dequantized(packed: Packed, start: int, stop: int) -> Tensor:
    """Rows start … stop of the weight, bfloat16 [rows, in]; start is a multiple of 16."""
    inputs, _, group = packed.shape
    dense = torch.empty(stop - start, inputs, dtype=torch.bfloat16)
    first = start // ROWS
    tensors = (packed.qweight[first:], packed.scales[first:], packed.qzeros[first:])
    blocks = -(-(stop - start) // ROWS)
    program(emit_dense, torch.bfloat16)(_Task(
        torch.get_num_threads(), dense.data_ptr(), *(t.data_ptr() for t in tensors), blocks, stop - start, inputs, group
    ))  # fmt: skip
    return dense


def emit_dense(module: ir.Module, element: ir.Type) -> list[ir.Function]:
    """dense(task, i, n): the i-th of n parts of the blocks of 16 rows, from layout rows16 to y [outputs, inputs]."""
    b, (task, index, count) = Emitter.define(module, "dense", [PTR, I64, I64])
    t = Task(b, task, _FIELDS)
    y, codes, scales, zeros, outputs, inputs, group = t.y, t.codes, t.scales, t.zeros, t.outputs, t.inputs, t.group
    groups, word = b.sdiv(inputs, group), vec(I8, 4)
    with b.loop(*b.part(t.rows, index, count)) as block:
        first = b.mul(block, const(I64, ROWS))
        left = b.sub(outputs, first)
        rows = b.select(b.icmp_signed("<", left, const(I64, ROWS)), left, const(I64, ROWS))
        lines = b.at(codes, b.mul(first, b.sdiv(inputs, const(I64, 2))), I8)
        with b.loop(const(I64, 0), rows) as r:
            own = b.at(lines, b.mul(r, const(I64, 4)), I8)
            out = b.at(y, b.mul(b.add(first, r), inputs), element)
            with b.loop(const(I64, 0), groups) as g:
                place = b.add(b.mul(b.add(b.mul(block, groups), g), const(I64, ROWS)), r)
                scale = b.splat(b.fpext(b.fetch(scales, place, F16, align=2), F32), _DEPTH)
                zero = b.splat(b.uitofp(b.fetch(zeros, place, I8), F32), _DEPTH)
                start = b.mul(g, group)
                with b.loop(start, b.add(start, group), _DEPTH) as k:
                    four = b.load(b.at(own, b.mul(k, const(I64, 8)), I8), typ=I32, align=4)
                    halves = (b.and_(four, const(I32, 0x0F0F0F0F)), b.and_(b.lshr(four, const(I32, 4)), const(I32, 0x0F0F0F0F)))
                    steps = b.uitofp(b.joined([b.bitcast(half, word) for half in halves]), vec(F32, _DEPTH))
                    value: Any = b.fmul(b.fsub(steps, zero), scale)
                    b.put(b.from_float(value, element), out, k, element)
    b.ret_void()
    return [b.function]
