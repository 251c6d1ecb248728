"""Starting the kernels of `decoding`, with the functions of the GPU's `decode_launch`."""

from __future__ import annotations

import torch
from torch import Tensor

from awq.kernels.cpu.decoding import (
    ACTIVATE,
    ADD_NORM,
    ATTEND,
    DENSE,
    emit_activate,
    emit_add_norm,
    emit_attend,
    emit_dense,
)
from awq.kernels.cpu.engine import program
from awq.kernels.cpu.pool import team_size
from awq.kernels.reference import decode as reference
from awq.kernels.specs import Attention, Norm

# elements, or products of attention, that one thread does sooner than two
MAX_SERIAL_WORK = 1 << 15


def add_norm(
    x: Tensor, branch: Tensor | None, factor: float, norm: Norm | None
) -> tuple[Tensor, Tensor]:
    """See `awq.kernels.reference.decode.add_norm`."""
    if branch is not None and branch.dim() > x.dim():
        branch = reference.summed(branch)
    if norm is None:
        total = x if branch is None else x + (branch if factor == 1.0 else factor * branch)
        return total, total

    x = x.contiguous()
    total = x if branch is None else torch.empty_like(x)
    y, width = torch.empty_like(x), x.shape[-1]
    weight, bias, eps = norm.weight, norm.bias, norm.eps
    kernel = program(
        emit_add_norm,
        x.dtype,
        branch is not None,
        norm.centered,
        weight is not None,
        bias is not None,
    )
    branch = None if branch is None else branch.contiguous()
    task = ADD_NORM.pack(
        threads=_threads(x.numel()),
        x=x,
        branch=branch,
        weight=weight,
        bias=bias,
        total=total,
        y=y,
        rows=x.numel() // width,
        width=width,
        factor=factor,
        eps=eps,
    )
    kernel(task)

    return total, y


def activate(h: Tensor, name: str, gated: bool, interleave: int = 0) -> Tensor:
    """See `awq.kernels.reference.decode.activate`."""
    if interleave:
        return reference.activate(h, name, gated, interleave)

    h = h.contiguous()
    width = h.shape[-1] // (2 if gated else 1)
    y = h.new_empty((*h.shape[:-1], width))
    task = ACTIVATE.pack(
        threads=_threads(4 * y.numel()), h=h, y=y, rows=y.numel() // width, width=width
    )
    program(emit_activate, h.dtype, name, gated)(task)

    return y


def attend(
    qkv: Tensor,
    a: Attention,
    cos: Tensor | None,
    sin: Tensor | None,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    longest: int,
) -> Tensor:
    """See `awq.kernels.reference.decode.attend`; of what `Attention.why_no_kernel` lets through."""
    qkv, batch = qkv.contiguous(), qkv.shape[0]
    out = qkv.new_empty((batch, a.heads * a.head_dim))
    threads = min(_threads(batch * a.heads * a.head_dim * (longest + 1)), batch * a.kv_heads)
    scratch = torch.empty(threads * (a.head_dim + longest + 1), dtype=torch.float32)
    (q_weight, q_eps), (k_weight, k_eps) = a.q_scale, a.k_scale
    kernel = program(
        emit_attend, qkv.dtype, a.rotary > 0, a.normed, a.centered, a.softcap is not None
    )
    task = ATTEND.pack(
        threads=threads,
        qkv=qkv,
        cos=cos,
        sin=sin,
        q_weight=q_weight,
        k_weight=k_weight,
        lengths=lengths,
        k_cache=k_cache,
        v_cache=v_cache,
        out=out,
        scratch=scratch,
        rows=batch,
        positions=k_cache.shape[2],
        heads=a.heads,
        kv_heads=a.kv_heads,
        dim=a.head_dim,
        rotary=a.rotary // 2,
        window=a.window or 0,
        scaling=a.scaling,
        softcap=a.softcap or 0.0,
        q_eps=q_eps,
        k_eps=k_eps,
        longest=longest,
    )
    kernel(task)

    return out


def dense(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, in] · weightᵀ (contiguous [out, in], float16, bfloat16 or float32) in float32 [rows,
    out]."""
    x = x.float().contiguous()
    outputs, inputs = weight.shape
    y = x.new_empty(len(x), outputs)
    task = DENSE.pack(
        threads=_threads(weight.numel()),
        x=x,
        weight=weight,
        y=y,
        rows=len(x),
        inputs=inputs,
        outputs=outputs,
    )
    program(emit_dense, weight.dtype)(task)

    return y


def _threads(work: int) -> int:
    return 1 if work <= MAX_SERIAL_WORK else team_size()
