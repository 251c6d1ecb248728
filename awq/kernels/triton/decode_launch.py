"""Starting the kernels of `decoding`, with the shapes and scratch memory that they need."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from awq.kernels.heads import Heads
from awq.kernels.packed import Packed
from awq.kernels.triton import decoding
from awq.kernels.triton.configs import RUN
from awq.kernels.triton.launch import Started, _on, architecture, choice, counters, fused, has_dependent_launch, through_dense


@cache
def _started(kernel: Any, index: int | None, dtypes: tuple[torch.dtype, ...], constants: tuple, warps: int) -> Started:
    """dtypes: of the tensors whose dtype is not always the same; they are among what Triton compiles for."""
    return Started(kernel, index, (*constants, has_dependent_launch(index)), {"num_warps": warps})


def add_norm(
    x: Tensor, branch: Tensor | None, factor: float, weight: Tensor | None, bias: Tensor | None, eps: float, mean: bool,
    norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x + factor · branch, its norm) for x, branch [..., width]; weight, bias float32 [width].

    norm False: no norm, the sum twice.
    """
    width = x.shape[-1]
    x = x.contiguous()
    total = x if branch is None else torch.empty_like(x)
    y = torch.empty_like(x) if norm else total
    rows = x.numel() // width
    if rows and (norm or branch is not None):
        block = triton.next_power_of_2(width)
        constants = (width, block, branch is not None, norm, mean, weight is not None, bias is not None)
        start = _started(decoding.add_norm_kernel, x.device.index, (x.dtype,), constants, min(16, max(1, block // 512)))
        tensors = (x, x if branch is None else branch.contiguous(), x if weight is None else weight, x if bias is None else bias)
        with _on(x.device):
            start((rows, 1, 1), (*tensors, total, y), factor, eps)
    return total, y


def activate(h: Tensor, name: str, gated: bool, run: int = 0) -> Tensor:
    """act(gate) · up for h [..., gate and up: `activations.columns`], or act(h)."""
    h = h.contiguous()
    width = h.shape[-1] // (2 if gated else 1)
    y = h.new_empty((*h.shape[:-1], width))
    rows = y.numel() // width
    if rows:
        block = 512 if rows < 64 else 2048
        start = _started(decoding.activate_kernel, h.device.index, (h.dtype,), (width, block, name, gated, run), block // 256)
        with _on(h.device):
            start((triton.cdiv(width, block), rows, 1), (h, y))
    return y


def gated(x: Tensor, packed: Packed, bias: Tensor | None, name: str) -> Tensor:
    """x [tokens, in] → act(gate) · up [tokens, out/2], for a weight whose outputs are gate and up in turn, in runs of `RUN`."""
    config = choice(x, packed.shape, len(x))
    if config is None or len(x) == 0:
        return activate(through_dense(x, packed, bias), name, True, RUN)
    return fused(x, packed, bias, config, name)


def split(
    qkv: Tensor, a: Heads, tables: tuple[Tensor | None, ...], start: int, k_cache: Tensor, v_cache: Tensor
) -> Tensor:  # fmt: skip
    """Queries [batch, heads, tokens, dim] of a piece of the prompts; keys and values go into the cache.

    qkv [batch, tokens, channels]; tables: cos and sin, and the weights of the norms of q and k, or Nones.
    """
    batch, tokens, _ = qkv.shape
    q = qkv.new_empty((batch, a.heads, tokens, a.dim))
    sizes = (a.heads, a.kv_heads, a.dim, _power(a.dim), a.rotary, _power(a.heads, 1), _power(a.kv_heads, 1))
    kernel = _started(decoding.split_kernel, qkv.device.index, (qkv.dtype,), (*sizes, a.normed, a.mean), 8)
    qkv = qkv.contiguous()
    with _on(qkv.device):
        kernel(
            (tokens, batch, 1), (qkv, *(qkv if t is None else t for t in tables), q, k_cache, v_cache),
            a.q_eps, a.k_eps, tokens, start, k_cache.shape[2],
        )  # fmt: skip
    return q


def attend(
    qkv: Tensor, a: Heads, tables: tuple[Tensor | None, ...], lengths: Tensor, k_cache: Tensor, v_cache: Tensor, longest: int = 0
) -> Tensor:  # fmt: skip
    """qkv [batch, channels] → [batch, heads · dim]; see `decoding.attend_kernel`. tables: as for `split`. longest is not needed."""
    batch, device = qkv.shape[0], qkv.device
    group, dim = _power(a.heads // a.kv_heads), _power(a.dim)
    parts = _split(batch * a.kv_heads, architecture(device.index)[1])
    out = qkv.new_empty((batch, a.heads * a.dim))
    sums = torch.empty((batch * a.kv_heads * parts, group, dim), dtype=torch.float32, device=device)
    peaks = torch.empty((batch * a.kv_heads * parts, 2, group), dtype=torch.float32, device=device)
    block, warps = (16, 4) if qkv.dtype == torch.float32 else _tile(dim)
    lines = 1 << max(0, (a.dim * qkv.element_size() // 128).bit_length() - 1)
    real = _power(a.heads // a.kv_heads, 1)
    together = max(1, min(parts, 4096 // (real * dim)))
    sizes = (a.heads, a.kv_heads, a.dim, dim, a.rotary, group, real, parts, together, block, lines, a.window, a.softcap is not None)
    kernel = _started(decoding.attend_kernel, device.index, (qkv.dtype,), (*sizes, a.normed, a.mean), warps)
    qkv = qkv.contiguous()
    with _on(device):
        arrived = counters(device).take(batch * a.kv_heads)
        kernel(
            (a.kv_heads, parts, batch),
            (qkv, *(qkv if t is None else t for t in tables), lengths, k_cache, v_cache, out, sums, peaks, arrived),
            a.scaling, a.softcap or 0.0, a.q_eps, a.k_eps, k_cache.shape[2],
        )  # fmt: skip
    return out


def _power(n: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(n))


def _tile(dim: int) -> tuple[int, int]:
    """(keys looked at together, warps)."""
    return (64, 4) if dim <= 128 else (32, 4)


def _split(rows: int, multiprocessors: int) -> int:
    """Programs that share the keys of one row and head: two for every multiprocessor in all, 64 at most."""
    split = 1
    while rows * split < 2 * multiprocessors and split < 64:
        split *= 2
    return split
