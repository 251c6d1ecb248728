"""The operators of a decode step in plain torch: the specification of the kernels, and what runs
where there are none.

A backend that offers one of these (see `awq.backends`) has the same signature and gives the same
values, up to rounding. Between them an operator does all there is to do between two products of a
decoder block:

    x, branch → add_norm → (product) → attend or split → (product) → add_norm → (product) → activate
    → (product) → branch
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.kernels.packed import Packed
from awq.kernels.reference.attention import attend as attention_of
from awq.kernels.reference.attention import rotate
from awq.kernels.specs import Attention, Norm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def apply_norm(x: Tensor, norm: Norm) -> Tensor:
    """The norm over the last axis, in float32, rounded once to x's dtype."""
    y = x.float()
    if norm.centered:
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.eps)
    if norm.weight is not None:
        y = y * norm.weight
    if norm.bias is not None:
        y = y + norm.bias

    return y.to(x.dtype)


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    factor: float,
    norm: Norm | None,
) -> tuple[Tensor, Tensor]:
    """(x + factor · branch, its norm) for x, branch [..., width]; without a norm the sum twice.

    A branch of one axis more, [..., parts, width], stands for the sum of its parts.
    """
    if branch is not None:
        branch = branch if branch.dim() == x.dim() else summed(branch)
        x = x + (branch if factor == 1.0 else factor * branch)
    return x, x if norm is None else apply_norm(x, norm)


def choose_token(
    logits: Tensor,
    ids: Tensor,
    going: Tensor,
    found: Tensor,
    ends: Tensor,
    padding: Tensor,
    scratch: Tensor,
) -> None:
    """The likeliest token of each row, in place.

    logits: float32 [batch, vocabulary]. ids int64 [batch]: the tokens, `padding` for rows that do
    not go on. going bool [batch]: cleared after one of the tokens `ends`. found int64 [batch + 1]:
    `ids`, and whether any row goes on. Of ends and padding, int64 [n] and [], numbers below 0 stand
    for none. scratch: int64 [batch], the least number in each place, before and after.
    """
    best = logits.argmax(-1)
    token = torch.where(going | (padding < 0), best, padding)
    ended = (token.unsqueeze(1) == ends).any(1)
    going.logical_and_(~ended)
    ids.copy_(token)
    found[:-1].copy_(token)
    found[-1:].copy_(going.any())


def summed(parts: Tensor) -> Tensor:
    """[..., parts, width] → [..., width]: added in float32, rounded once."""
    if parts.shape[-2] > 1:
        return parts.float().sum(-2).to(parts.dtype)
    return parts.squeeze(-2)


def activate(h: Tensor, name: str, gated: bool, interleave: int = 0) -> Tensor:
    """act(gate) · up for h [..., gate and up], or act(h) for h [..., width].

    interleave: so many channels of the gate, then as many of up, in turn; 0: all of the gate, then
    all of up.
    """
    function = ACTIVATIONS[name]
    if not gated:
        return function(h)
    if not interleave:
        gate, up = h.chunk(2, -1)
        return function(gate) * up

    gate, up = h.unflatten(-1, (-1, 2, interleave)).unbind(-2)
    gate = gate.flatten(-2)
    up = up.flatten(-2)

    return function(gate) * up


def gated(x: Tensor, packed: Packed, bias: Tensor | None, name: str, interleave: int) -> Tensor:
    """x [..., in] → act(gate) · up [..., out/2], for a weight whose outputs are gate and up in turn
    (see `activate`)."""
    from awq.kernels.op import quantized_linear

    h = quantized_linear(
        x, packed.qweight, packed.qzeros, packed.scales, bias, *packed.shape, packed.layout
    )
    return activate(h, name, True, interleave)


def gate_interleave() -> int:
    """How many channels of the gate and of up `gated` wants in turn in the weight; 0: it wants
    none, as two kernels do."""
    return 0


def split_heads(
    qkv: Tensor,
    a: Attention,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, tokens, channels] → normalized and rotated q, k and v, each [batch, heads, tokens,
    head_dim].

    cos, sin: float32, broadcast against [batch, heads, tokens, rotary/2].
    """
    batch, tokens, _ = qkv.shape
    sizes = (a.head_dim, a.head_dim, a.value_head)
    parts = zip(qkv.split(a.widths, -1), sizes)
    q, k, v = (part.reshape(batch, tokens, -1, size) for part, size in parts)
    q = _norm_of(q, a.q_norm, a.norm_heads)
    k = _norm_of(k, a.k_norm, a.norm_heads)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))

    if cos is not None and sin is not None:
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)

    return q, k, v


def _norm_of(x: Tensor, norm: Norm | None, each_head: bool) -> Tensor:
    """x [batch, tokens, heads, head_dim], normalized over each head or over all of them
    together."""
    if norm is None:
        return x
    if each_head:
        return apply_norm(x, norm)
    return apply_norm(x.flatten(2), norm).view(x.shape)


def heads_flat(x: Tensor) -> Tensor:
    """[batch, heads, tokens, channels] → [batch, tokens, heads · channels]."""
    return x.transpose(1, 2).flatten(2)


def split(
    qkv: Tensor,
    a: Attention,
    cos: Tensor | None,
    sin: Tensor | None,
    start: int,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """Queries [batch, heads, tokens, head_dim] of a piece of the prompts; its keys and values go
    into the cache at `start`.

    qkv [batch, tokens, channels]; cos, sin float32 [positions, rotary/2] or None; k_cache, v_cache
    [batch, kv_heads, positions, head_dim].
    """
    stop = start + qkv.shape[1]
    if cos is not None and sin is not None:
        cos = cos[start:stop]
        sin = sin[start:stop]

    q, k, v = split_heads(qkv, a, cos, sin)
    k_cache[:, :, start:stop] = k
    v_cache[:, :, start:stop] = v

    return q


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
    """Attention of one new token per row over its row of the cache, into which its key and value
    go.

    qkv [batch, channels] → [batch, heads · head_dim]. lengths int32 [batch]: tokens cached so far,
    of which `longest` is the largest. cos, sin and the caches are as for `split`.
    """
    batch = qkv.shape[0]
    index = lengths.long()
    if cos is not None and sin is not None:
        cos = cos[index].view(batch, 1, 1, -1)
        sin = sin[index].view(batch, 1, 1, -1)

    q, k, v = split_heads(qkv.unsqueeze(1), a, cos, sin)
    rows = torch.arange(batch, device=qkv.device)
    k_cache[rows, :, index] = k[:, :, 0]
    v_cache[rows, :, index] = v[:, :, 0]
    keys = torch.arange(longest + 1, device=qkv.device)
    seen = keys <= index.unsqueeze(1)
    if a.window is not None:
        seen &= keys > index.unsqueeze(1) - a.window

    keys_seen = k_cache[:, :, : longest + 1]
    values_seen = v_cache[:, :, : longest + 1]
    y = attention_of(
        q,
        keys_seen,
        values_seen,
        a.scaling,
        a.softcap,
        mask=seen[:, None, None],
        sinks=a.sinks,
    )

    return y.transpose(1, 2).reshape(batch, -1)


def dense(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, in] · weightᵀ ([out, in], x's dtype) in float32 [rows, out]."""
    return F.linear(x, weight).float()
