"""Starting the kernels of `decoding`, with the functions of the GPU's `decode_launch`."""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from typing import Any

import torch
from torch import Tensor

from awq.kernels.cpu.decoding import emit_activate, emit_add_norm, emit_attend, emit_dense
from awq.kernels.cpu.engine import program
from awq.kernels.heads import Heads

_ALONE = 1 << 15  # elements, or products of attention, that one thread does sooner than two


def add_norm(
    x: Tensor, branch: Tensor | None, factor: float, weight: Tensor | None, bias: Tensor | None, eps: float, mean: bool, norm: bool
) -> tuple[Tensor, Tensor]:
    """(x + factor · branch, its norm) for x, branch [..., width]; weight, bias float32 [width].

    norm False: no norm, the sum twice.
    """
    if not norm:
        total = x if branch is None else x + (branch if factor == 1.0 else factor * branch)
        return total, total
    x = x.contiguous()
    total = x if branch is None else torch.empty_like(x)
    y, width = torch.empty_like(x), x.shape[-1]
    kernel = program(emit_add_norm, x.dtype, branch is not None, mean, weight is not None, bias is not None)
    branch = None if branch is None else branch.contiguous()
    kernel(_task(
        _threads(x.numel()), _address(x), _address(branch), _address(weight), _address(bias), _address(total), _address(y),
        x.numel() // width, width, _bits(factor), _bits(eps),
    ))  # fmt: skip
    return total, y


def activate(h: Tensor, name: str, gated: bool) -> Tensor:
    """act(gate) · up for h = [gate, up] along the last axis, or act(h)."""
    h = h.contiguous()
    width = h.shape[-1] // (2 if gated else 1)
    y = h.new_empty((*h.shape[:-1], width))
    program(emit_activate, h.dtype, name, gated)(
        _task(_threads(4 * y.numel()), _address(h), _address(y), y.numel() // width, width)
    )
    return y


def attend(
    qkv: Tensor, a: Heads, tables: tuple[Tensor | None, ...], lengths: Tensor, k_cache: Tensor, v_cache: Tensor, longest: int
) -> Tensor:  # fmt: skip
    """qkv [batch, channels] → [batch, heads · dim]; see `decoding.emit_attend`.

    tables: cos and sin, and the weights of the norms of q and k, or Nones. longest: the largest of `lengths`.
    """
    qkv, batch = qkv.contiguous(), qkv.shape[0]
    out = qkv.new_empty((batch, a.heads * a.dim))
    threads = min(_threads(batch * a.heads * a.dim * (longest + 1)), batch * a.kv_heads)
    scratch = torch.empty(threads * (a.dim + longest + 1), dtype=torch.float32)
    kernel = program(emit_attend, qkv.dtype, a.rotary > 0, a.normed, a.mean, a.softcap is not None)
    kernel(_task(
        threads, _address(qkv), *map(_address, tables), _address(lengths), _address(k_cache), _address(v_cache), _address(out),
        _address(scratch), batch, k_cache.shape[2], a.heads, a.kv_heads, a.dim, a.rotary, a.window,
        _bits(a.scaling), _bits(a.softcap or 0.0), _bits(a.q_eps), _bits(a.k_eps), longest,
    ))  # fmt: skip
    return out


def dense(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, in] · weightᵀ (contiguous [out, in], float16, bfloat16 or float32) in float32 [rows, out]."""
    x = x.float().contiguous()
    outputs, inputs = weight.shape
    y = x.new_empty(len(x), outputs)
    program(emit_dense, weight.dtype)(
        _task(_threads(weight.numel()), _address(x), _address(weight), _address(y), len(x), inputs, outputs)
    )
    return y


def _threads(work: int) -> int:
    return 1 if work <= _ALONE else torch.get_num_threads()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@cache
def _bits(number: float) -> int:
    return int.from_bytes(struct.pack("<f", number), "little")


def _task(*fields: int) -> Any:
    return _array(len(fields))(*fields)


@cache
def _array(length: int) -> Any:
    return ctypes.c_int64 * length
