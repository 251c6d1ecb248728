"""Starting the kernels of `decoding`, with the shapes and scratch memory that they need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from awq.kernels.triton import decoding
from awq.kernels.triton.launch import _on, architecture, counters, has_dependent_launch

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def _options(x: Tensor, warps: int) -> dict:
    return {"num_warps": warps} | ({"launch_pdl": True} if has_dependent_launch(x.device.index) else {})


def add_norm(
    x: Tensor, branch: Tensor | None, factor: float, weight: Tensor | None, bias: Tensor | None, eps: float, mean: bool, norm: bool
) -> tuple[Tensor, Tensor]:
    """(x + factor · branch, its norm) for x, branch [..., width]; weight, bias float32 [width]. norm False: no norm, the sum twice."""
    width = x.shape[-1]
    x = x.contiguous()
    total = x if branch is None else torch.empty_like(x)
    y = torch.empty_like(x) if norm else total
    rows = x.numel() // width
    if rows and (norm or branch is not None):
        block = triton.next_power_of_2(width)
        with _on(x.device):
            decoding.add_norm_kernel[(rows,)](
                x, x if branch is None else branch.contiguous(), x if weight is None else weight, x if bias is None else bias,
                total, y, factor, eps, width, block, branch is not None, norm, mean, weight is not None, bias is not None,
                has_dependent_launch(x.device.index), **_options(x, min(16, max(1, block // 512))),
            )  # fmt: skip
    return total, y


def activate(h: Tensor, name: str, gated: bool) -> Tensor:
    """act(gate) · up for h = [gate, up] along the last axis, or act(h)."""
    h = h.contiguous()
    width = h.shape[-1] // (2 if gated else 1)
    y = h.new_empty((*h.shape[:-1], width))
    rows = y.numel() // width
    if rows:
        with _on(h.device):
            decoding.activate_kernel[(triton.cdiv(width, 512), rows)](
                h, y, width, 512, name, gated, has_dependent_launch(h.device.index), **_options(h, 2)
            )
    return y


@dataclass(frozen=True)
class Heads:
    """heads, kv_heads, dim; rotary: half the rotated channels; window 0: none; normed, mean: norm of each query and key head."""

    heads: int
    kv_heads: int
    dim: int
    rotary: int
    scaling: float
    softcap: float | None
    window: int
    normed: bool
    mean: bool
    q_eps: float = 0.0
    k_eps: float = 0.0


def attend(
    qkv: Tensor, heads: Heads, cos: Tensor | None, sin: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
    lengths: Tensor, k_cache: Tensor, v_cache: Tensor,
) -> Tensor:  # fmt: skip
    """qkv [batch, channels] → [batch, heads · dim]; see `decoding.attend_kernel`."""
    batch, device = qkv.shape[0], qkv.device
    group = max(16, triton.next_power_of_2(heads.heads // heads.kv_heads))
    dim = max(16, triton.next_power_of_2(heads.dim))
    split = _split(batch * heads.kv_heads, architecture(device.index)[1])
    out = qkv.new_empty((batch, heads.heads * heads.dim))
    sums = torch.empty((batch * heads.kv_heads * split, group, dim), dtype=torch.float32, device=device)
    peaks = torch.empty((batch * heads.kv_heads * split, 2, group), dtype=torch.float32, device=device)
    block = 16 if qkv.dtype == torch.float32 else 64 if dim <= 128 else 32
    with _on(device):
        arrived = counters(device).take(batch * heads.kv_heads)
        decoding.attend_kernel[(heads.kv_heads, split, batch)](
            qkv.contiguous(), qkv if cos is None else cos, qkv if sin is None else sin,
            qkv if q_weight is None else q_weight, qkv if k_weight is None else k_weight, lengths, k_cache, v_cache, out, sums,
            peaks, arrived, heads.scaling, heads.softcap or 0.0, heads.q_eps, heads.k_eps, k_cache.stride(0), k_cache.stride(1),
            heads.heads, heads.kv_heads, heads.dim, dim, heads.rotary, group, split, block, heads.window,
            heads.softcap is not None, heads.normed, heads.mean, has_dependent_launch(device.index), **_options(qkv, 4),
        )  # fmt: skip
    return out


def _split(rows: int, multiprocessors: int) -> int:
    """Programs that share the keys of one row and head: two for every multiprocessor in all, 64 at most."""
    split = 1
    while rows * split < 2 * multiprocessors and split < 64:
        split *= 2
    return split
