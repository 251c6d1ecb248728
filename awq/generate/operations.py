"""What a fused block does between its products: plain operators, or one kernel each on a GPU with Triton or a CPU with llvmlite."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from awq._triton import triton_problem
from awq.generate.attention import attend, rotate
from awq.generate.cache import LayerCache
from awq.generate.norms import apply_norm
from awq.generate.plan import Attention, Norm
from awq.kernels import cpu
from awq.kernels.backends import choose
from awq.kernels.heads import Heads
from awq.nn.linear import WQLinear

_FEW = 4  # rows for which reading the head takes longer than computing with it
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def has_kernels(x: Tensor) -> bool:
    """Whether the kernels run on x; in Triton's interpreter (a test) also on a CPU."""
    return (x.is_cuda or INTERPRETED) and x.dtype != torch.float64 and triton_problem(x.device) is None


def kernels(x: Tensor) -> Any:
    """The module that starts kernels for x: `awq.kernels.triton.decode_launch` or its twin for CPUs; None when there are none."""
    if has_kernels(x):
        from awq.kernels.triton import decode_launch

        return decode_launch
    if x.device.type == "cpu" and x.dtype in cpu.PLANES and cpu.problem(x.dtype, cpu.PLANES[x.dtype]) is None:
        from awq.kernels.cpu import decode_launch as on_cpu

        return on_cpu
    return None


def add_norm(x: Tensor, branch: Tensor | None, factor: float, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """(x + factor · branch, its norm); all [batch, tokens, features]."""
    decode_launch = kernels(x)
    if decode_launch is not None:
        n = norm or Norm(None, None, 0.0, False)
        return decode_launch.add_norm(x, branch, factor, n.weight, n.bias, n.eps, n.mean, norm is not None)
    if branch is not None:
        x = x + (branch if factor == 1.0 else factor * branch)
    return x, x if norm is None else apply_norm(x, norm)


def normalize(x: Tensor, norm: Norm | None) -> Tensor:
    """The norm of x [batch, tokens, features]; x itself without one."""
    return add_norm(x, None, 1.0, norm)[1]


def activate(h: Tensor, activation: Callable[[Tensor], Tensor], name: str | None, gated: bool) -> Tensor:
    """activation(gate) · up for h = [gate, up] along the last axis, or activation(h)."""
    decode_launch = None if name is None else kernels(h)
    if decode_launch is not None:
        return decode_launch.activate(h, name, gated)
    if not gated:
        return activation(h)
    gate, up = h.chunk(2, -1)
    return activation(gate) * up


def gate_run(linear: WQLinear) -> int:
    """How many channels of the gate and of up are to be in turn, so that `gated` is one kernel on the linear's device; or 0."""
    return getattr(kernels(torch.empty(0, dtype=torch.float16, device=linear.qweight.device)), "RUN", 0)


def gated(x: Tensor, linear: WQLinear, activation: Callable[[Tensor], Tensor], name: str, run: int) -> Tensor:
    """activation(gate) · up for a linear whose outputs are `run` channels of the gate and `run` of up in turn."""
    if has_kernels(x) and choose(x.device, x.dtype, linear.packed.shape, linear.layout) == "triton":
        from awq.kernels.triton import decode_launch

        y = decode_launch.gated(x.reshape(-1, x.shape[-1]), linear.packed, linear.bias, name)
        return y.view(*x.shape[:-1], -1)
    gate, up = linear(x).unflatten(-1, (-1, 2, run)).unbind(-2)
    return activation(gate.flatten(-2)) * up.flatten(-2)


def split_heads(qkv: Tensor, a: Attention, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, tokens, channels] → normalized and rotated q, k and v, each [batch, heads, tokens, head_dim].

    cos, sin: float32, broadcast against [batch, heads, tokens, rotary/2].
    """
    batch, tokens, _ = qkv.shape
    parts = qkv.split([a.heads * a.head_dim, a.kv_heads * a.head_dim, a.kv_heads * a.head_dim], -1)
    q, k, v = (t.view(batch, tokens, -1, a.head_dim) for t in parts)
    if a.q_norm is not None:
        q = apply_norm(q, a.q_norm) if a.norm_heads else apply_norm(q.flatten(2), a.q_norm).view(q.shape)
    if a.k_norm is not None:
        k = apply_norm(k, a.k_norm) if a.norm_heads else apply_norm(k.flatten(2), a.k_norm).view(k.shape)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q, k, v


def cache_prompt(qkv: Tensor, a: Attention, cos: Tensor | None, sin: Tensor | None, cache: LayerCache, start: int) -> Tensor:
    """Queries [batch, heads, tokens, head_dim] of a piece of the prompts, whose keys and values go into the cache at `start`."""
    stop = start + qkv.shape[1]
    if has_kernels(qkv) and (heads := _heads(a, cos)) is not None:
        from awq.kernels.triton import decode_launch

        return decode_launch.split(qkv, heads, _tables(a, cos, sin), start, cache.k, cache.v)
    cos, sin = (None if t is None else t[start:stop] for t in (cos, sin))
    q, k, v = split_heads(qkv, a, cos, sin)
    cache.k[:, :, start:stop] = k
    cache.v[:, :, start:stop] = v
    return q


def attend_step(
    qkv: Tensor, a: Attention, cos: Tensor | None, sin: Tensor | None, cache: LayerCache, lengths: Tensor, longest: int
) -> Tensor:
    """Attention of one new token per row over its row of the cache, into which its key and value go.

    qkv [batch, 1, channels] → [batch, 1, heads · head_dim]. lengths int32 [batch]: tokens cached so far.
    """
    decode_launch = kernels(qkv)
    if decode_launch is not None and (heads := _heads(a, cos)) is not None:
        tables = _tables(a, cos, sin)
        return decode_launch.attend(qkv[:, 0], heads, tables, lengths, cache.k, cache.v, longest).unsqueeze(1)
    batch, index = qkv.shape[0], lengths.long()
    if cos is not None and sin is not None:
        cos, sin = cos[index].view(batch, 1, 1, -1), sin[index].view(batch, 1, 1, -1)
    q, k, v = split_heads(qkv, a, cos, sin)
    rows = torch.arange(batch, device=qkv.device)
    cache.k[rows, :, index] = k[:, :, 0]
    cache.v[rows, :, index] = v[:, :, 0]
    keys = torch.arange(longest + 1, device=qkv.device)
    seen = keys <= index.unsqueeze(1)
    if a.window is not None:
        seen &= keys > index.unsqueeze(1) - a.window
    y = attend(q, cache.k[:, :, : longest + 1], cache.v[:, :, : longest + 1], a.scaling, a.softcap, mask=seen[:, None, None])
    return y.transpose(1, 2).reshape(batch, 1, -1)


def head(x: Tensor, module: nn.Module) -> Tensor:
    """Logits float32 [batch, vocabulary] of x [batch, features]."""
    if x.device.type == "cpu" and type(module) is nn.Linear and module.bias is None and len(x) <= _FEW:
        decode_launch = kernels(x)
        if decode_launch is not None and module.weight.is_contiguous() and module.weight.dtype == x.dtype:
            return decode_launch.dense(x, module.weight)
    return module(x).float()


def _tables(a: Attention, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor | None, ...]:
    return (cos, sin, *(None if n is None else n.weight for n in (a.q_norm, a.k_norm)))


def _heads(a: Attention, cos: Tensor | None) -> Heads | None:
    """The attention as the kernel takes it; None when it does not."""
    q, k = a.q_norm, a.k_norm
    if a.head_dim > 256 or a.heads % a.kv_heads or (q is None) != (k is None):
        return None
    rotary = 0 if cos is None else cos.shape[-1]
    sizes = (a.heads, a.kv_heads, a.head_dim, rotary, a.scaling, a.softcap, a.window or 0)
    if q is None or k is None:
        return Heads(*sizes, False, False)
    if not a.norm_heads or q.mean != k.mean or any(n.bias is not None or n.weight is None for n in (q, k)):
        return None
    return Heads(*sizes, True, q.mean, q.eps, k.eps)
