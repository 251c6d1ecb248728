"""The operators of a decode step on a GPU: sizes, constants and scratch memory of the kernels in
`decoding`, `heads`, `attending` and `choosing`.

Each does what the function of its name in `awq.kernels.reference.decode` says, where shapes and
errors are told.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from awq.kernels.packed import Packed
from awq.kernels.reference import decode as reference
from awq.kernels.specs import Attention, Norm
from awq.kernels.triton import attending, choosing, decoding, heads
from awq.kernels.triton.configs import GATE_INTERLEAVE
from awq.kernels.triton.launcher import (
    Launcher,
    architecture,
    counters,
    has_dependent_launch,
    on_device,
)
from awq.kernels.triton.matmul_launch import product, through_dense

FEW_ROWS = 64  # fewer leave multiprocessors idle, so blocks are small
SMALL_BLOCK, LARGE_BLOCK = 512, 2048  # channels of an activation, by one program
CACHE_LINE_BYTES = 128
MAX_SUMS_TOGETHER = 8192  # float32 sums that a program loads at once
LEAST_BLOCKS = 4  # of keys, for one program
MAX_KEY_SPLIT = 64  # programs that share the keys of one row and head


@cache
def launcher_of(
    kernel: Any,
    index: int | None,
    dtypes: Any,
    constants: tuple,
    warps: int,
) -> Launcher:
    """dtypes: of the activations, and whatever else Triton compiles for."""
    return Launcher(kernel, index, (*constants, has_dependent_launch(index)), num_warps=warps)


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    factor: float,
    norm: Norm | None,
) -> tuple[Tensor, Tensor]:
    """(x + factor · branch, its norm)."""
    x = x.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    total = x if branch is None else torch.empty_like(x)
    y = total if norm is None else torch.empty_like(x)
    if rows == 0 or (norm is None and branch is None):
        return total, y

    weight = bias = None
    eps = 0.0
    mean = False
    if norm is not None:
        weight = norm.weight
        bias = norm.bias
        eps = norm.eps
        mean = norm.centered

    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // 512))
    constants = (
        width,
        block,
        parts_of(x, branch),
        norm is not None,
        mean,
        weight is not None,
        bias is not None,
    )
    kernel = launcher_of(decoding.add_norm_kernel, x.device.index, x.dtype, constants, warps)

    # x stands for what is not there
    second = x if branch is None else branch.contiguous()
    weight = x if weight is None else weight
    bias = x if bias is None else bias
    tensors = (x, second, weight, bias, total, y)

    with on_device(x.device):
        kernel((rows, 1, 1), tensors, factor, eps)

    return total, y


def parts_of(x: Tensor, branch: Tensor | None) -> int:
    """How many rows of the branch are added up for one of x; 0 without a branch."""
    return 0 if branch is None else branch.numel() // x.numel()


def activate(h: Tensor, name: str, gated: bool, interleave: int = 0) -> Tensor:
    """act(gate) · up, or act(h)."""
    h = h.contiguous()
    width = h.shape[-1] // (2 if gated else 1)
    y = h.new_empty((*h.shape[:-1], width))
    rows = y.numel() // width
    if rows == 0:
        return y

    block = SMALL_BLOCK if rows < FEW_ROWS else LARGE_BLOCK
    constants = (width, block, name, gated, interleave)
    kernel = launcher_of(decoding.activate_kernel, h.device.index, h.dtype, constants, block // 256)
    with on_device(h.device):
        kernel((triton.cdiv(width, block), rows, 1), (h, y))

    return y


def choose_token(
    logits: Tensor,
    ids: Tensor,
    going: Tensor,
    found: Tensor,
    ends: Tensor,
    padding: Tensor,
    scratch: Tensor,
) -> None:
    """A greedy choice in one kernel."""
    batch, vocabulary = logits.shape
    index = logits.device.index
    rows, last = triton.next_power_of_2(batch), len(ends)
    constants = (LARGE_BLOCK, rows, last)
    kernel = launcher_of(choosing.choose_token_kernel, index, logits.dtype, constants, 4)
    with on_device(logits.device):
        arrived = counters(logits.device).take(1)
        tensors = (logits.contiguous(), ids, going, found, ends, padding, scratch, arrived)
        kernel((triton.cdiv(vocabulary, LARGE_BLOCK), batch, 1), tensors, batch, vocabulary)


def gate_interleave() -> int:
    """With so many channels of gate and up in turn, product and activation are one kernel."""
    return GATE_INTERLEAVE


def gated(x: Tensor, packed: Packed, bias: Tensor | None, name: str, interleave: int) -> Tensor:
    """Product and activation in one kernel."""
    if packed.layout != "planar" or interleave != GATE_INTERLEAVE:
        return reference.gated(x, packed, bias, name, interleave)

    rows = x.reshape(-1, x.shape[-1])
    y = product(rows, packed, bias, name) if len(rows) else None
    if y is None:
        y = activate(through_dense(rows, packed, bias), name, True, interleave)

    return y.view(*x.shape[:-1], -1)


def split(
    qkv: Tensor,
    a: Attention,
    cos: Tensor | None,
    sin: Tensor | None,
    start: int,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """Queries of a piece of the prompts; keys and values go into the cache."""
    batch, tokens, _ = qkv.shape
    qkv = qkv.contiguous()
    q = qkv.new_empty((batch, a.heads, tokens, a.head_dim))
    constants = (
        a.heads,
        a.kv_heads,
        a.head_dim,
        _power(a.head_dim),
        a.rotary // 2,
        _power(a.heads, 1),
        _power(a.kv_heads, 1),
        a.normed,
        a.centered,
    )
    kernel = launcher_of(heads.split_kernel, qkv.device.index, qkv.dtype, constants, 8)
    tables, q_eps, k_eps = _tables(qkv, a, cos, sin)

    with on_device(qkv.device):
        kernel(
            (tokens, batch, 1),
            (qkv, *tables, q, k_cache, v_cache),
            q_eps,
            k_eps,
            tokens,
            start,
            k_cache.shape[2],
        )

    return q


def attend(
    qkv: Tensor,
    a: Attention,
    cos: Tensor | None,
    sin: Tensor | None,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    longest: int = 0,
) -> Tensor:
    """Attention of one new token per row. `longest` is not needed: the kernel reads `lengths`."""
    batch = qkv.shape[0]
    device = qkv.device
    qkv = qkv.contiguous()
    group = _power(a.heads // a.kv_heads)
    dim = _power(a.head_dim)
    parts = _key_split(batch * a.kv_heads, architecture(device.index)[1])
    rows = batch * a.kv_heads * parts
    out = qkv.new_empty((batch, a.heads * a.head_dim))
    sums = torch.empty((rows, group, dim), dtype=torch.float32, device=device)
    peaks = torch.empty((rows, 2, group), dtype=torch.float32, device=device)
    kernel = _attend_launcher(a, device.index, qkv.dtype, qkv.element_size(), parts)
    tables, q_eps, k_eps = _tables(qkv, a, cos, sin)

    with on_device(device):
        arrived = counters(device).take(batch * a.kv_heads)
        tensors = (qkv, *tables, lengths, k_cache, v_cache, out, sums, peaks, arrived)
        kernel(
            (a.kv_heads, parts, batch),
            tensors,
            a.scaling,
            a.softcap or 0.0,
            q_eps,
            k_eps,
            k_cache.shape[2],
        )

    return out


def _attend_launcher(
    a: Attention,
    index: int | None,
    dtype: torch.dtype,
    element_bytes: int,
    parts: int,
) -> Launcher:
    dim = _power(a.head_dim)
    block, warps = (16, 4) if dtype == torch.float32 else _tile(dim)
    real_group = _power(a.heads // a.kv_heads, 1)
    lines = 1 << max(0, (a.head_dim * element_bytes // CACHE_LINE_BYTES).bit_length() - 1)
    constants = (
        a.heads,
        a.kv_heads,
        a.head_dim,
        dim,
        a.rotary // 2,
        _power(a.heads // a.kv_heads),
        real_group,
        parts,
        max(1, min(parts, MAX_SUMS_TOGETHER // (real_group * dim))),
        block,
        LEAST_BLOCKS * block,
        lines,
        a.window or 0,
        a.softcap is not None,
        a.normed,
        a.centered,
    )

    return launcher_of(attending.attend_kernel, index, dtype, constants, warps)


def _tables(
    qkv: Tensor,
    a: Attention,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[tuple[Tensor, ...], float, float]:
    """Rotary tables and weights of norms, qkv itself in place of what there is not; and the norms'
    eps."""
    (q_weight, q_eps), (k_weight, k_eps) = a.q_scale, a.k_scale
    tables = tuple(qkv if t is None else t for t in (cos, sin, q_weight, k_weight))
    return tables, q_eps, k_eps


def _power(n: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(n))


def _tile(dim: int) -> tuple[int, int]:
    """(keys looked at together, warps)."""
    return (64, 4) if dim <= 128 else (32, 4)


def _key_split(rows: int, multiprocessors: int) -> int:
    """Programs that share the keys of one row and head: two for every multiprocessor in all, 64 at
    most."""
    split = 1
    while rows * split < 2 * multiprocessors and split < MAX_KEY_SPLIT:
        split *= 2
    return split
