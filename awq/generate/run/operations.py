"""What a fused block does between its products. `awq.backends` says who computes each operator;
here its inputs are checked.

A kernel is given addresses, so what does not fit is refused before: widths, dtypes, devices, and
places beyond the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from awq.backends import operator
from awq.errors import ConfigError
from awq.generate.run.cache import LayerCache
from awq.kernels.checks import check_experts
from awq.kernels.packed import Packed
from awq.kernels.reference import decode as plain
from awq.kernels.reference import mixture
from awq.kernels.reference.attention import attend
from awq.kernels.reference.decode import split_heads as split_heads
from awq.kernels.reference.decode import summed as summed
from awq.kernels.specs import Attention, Norm, Router
from awq.nn.linear import WQLinear
from awq.nn.packed_experts import AwqExperts

MOST_HEAD_ROWS = 4  # rows for which reading the head takes longer than computing with it


def _operator(name: str, x: Tensor) -> Callable[..., Any]:
    found = operator(name, x.device, x.dtype)
    assert found is not None  # the reference has them all
    return found


def _refuse(what: str, tensor: Tensor, wanted: str) -> ConfigError:
    return ConfigError(
        f"{what} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; it must be {wanted}."
    )


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    factor: float,
    norm: Norm | None,
) -> tuple[Tensor, Tensor]:
    """(x + factor · branch, its norm); all [batch, tokens, features], the branch also [batch,
    tokens, parts, features], which are added up. Raises ConfigError when they do not fit
    together."""
    _check_sum(x, branch, norm)
    return _operator("add_norm", x)(x, branch, factor, norm)


def add_norm_route(
    x: Tensor,
    branch: Tensor | None,
    factor: float,
    norm: Norm | None,
    router: Router,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`add_norm`; and the chosen experts int32 and their weights float32, [batch · tokens, top_k],
    of what it normalized."""
    _check_sum(x, branch, norm)
    weight = router.weight
    wide_enough = weight.shape[1] == x.shape[-1]
    beside = weight.device == x.device
    if not wide_enough or not beside or not weight.is_contiguous():
        raise _refuse(
            "the router's weight", weight, f"[experts, {x.shape[-1]}] on {x.device} in one piece"
        )

    for vector in (router.bias, router.correction):
        if vector is not None:
            _check_vector(vector, weight[:, 0])

    return _operator("add_norm_route", x)(x, branch, factor, norm, router)


def expert_parts(
    x: Tensor,
    experts: AwqExperts,
    index: Tensor,
    weights: Tensor,
    activation: str,
) -> Tensor:
    """The weighted outputs of the chosen experts, [batch, tokens, parts, features], to be added up;
    x [batch, tokens, features]."""
    first = experts.first.ready(x.dtype)
    second = experts.second.ready(x.dtype)
    _check_stack(first, x.shape[-1], x)
    _check_stack(second, first.shape.out_features // 2, x)
    check_experts(index, weights, None, x.device)
    planar = first.layout == second.layout == "planar"
    compute = _operator("expert_parts", x) if planar else mixture.expert_parts
    rows = x.reshape(-1, x.shape[-1])
    biases = experts.first.bias, experts.second.bias
    alternating = experts.shape.interleaved
    y = compute(rows, first, second, biases, index, weights, activation, alternating)
    batch_and_tokens = x.shape[:-1]
    parts_and_features = y.shape[1:]

    return y.view(*batch_and_tokens, *parts_and_features)


def _check_stack(packed: Packed, inputs: int, x: Tensor) -> None:
    if packed.shape.in_features != inputs or packed.qweight.device != x.device:
        wanted = f"of {inputs} inputs on {x.device}"
        raise _refuse("the experts' weight", packed.qweight, wanted)


def _check_sum(x: Tensor, branch: Tensor | None, norm: Norm | None) -> None:
    """A branch and a norm fit x. Raises ConfigError otherwise."""
    if branch is not None:
        shape = _sum_shape(branch, x.dim())
        if shape != x.shape or branch.dtype != x.dtype or branch.device != x.device:
            wanted = f"{x.dtype} {list(x.shape)} on {x.device}, as what it is added to"
            raise _refuse("the branch", branch, wanted)
    if norm is not None:
        if norm.weight is not None:
            _check_vector(norm.weight, x)
        if norm.bias is not None:
            _check_vector(norm.bias, x)


def _sum_shape(branch: Tensor, axes: int) -> tuple[int, ...]:
    """A branch's shape, without the axis of its parts where it has one axis more than `axes`."""
    if branch.dim() <= axes:
        return branch.shape
    *places, _, features = branch.shape
    return *places, features


def _check_vector(vector: Tensor, x: Tensor) -> None:
    """Of a norm: a kernel reads as many numbers of it as x is wide."""
    width = x.size(-1)
    if (
        vector.dim() != 1
        or vector.numel() != width
        or vector.dtype != torch.float32
        or vector.device != x.device
        or not vector.is_contiguous()
    ):
        raise _refuse("a norm's weight or bias", vector, f"float32 [{width}] on {x.device}")


def normalize(x: Tensor, norm: Norm | None) -> Tensor:
    """The norm of x [batch, tokens, features]; x itself without one."""
    return add_norm(x, None, 1.0, norm)[1]


def activate(
    h: Tensor,
    activation: Callable[[Tensor], Tensor],
    name: str | None,
    gated: bool,
) -> Tensor:
    """activation(gate) · up for h = [gate, up] along the last axis, or activation(h).

    name: of the activation in `ACTIVATIONS`; None for one that no kernel knows.
    """
    if gated and h.shape[-1] % 2:
        raise ConfigError(
            f"gate and up have {h.shape[-1]} channels together, which is an odd number."
        )
    if name is not None:
        return _operator("activate", h)(h, name, gated)
    if not gated:
        return activation(h)

    gate, up = h.chunk(2, -1)
    return activation(gate) * up


def gate_interleave(linear: WQLinear) -> int:
    """How many channels of the gate and of up are to be in turn, so that `gated` is one kernel on
    the linear's device; or 0."""
    return _operator(
        "gate_interleave", torch.empty(0, dtype=torch.float16, device=linear.qweight.device)
    )()


def gated(x: Tensor, linear: WQLinear, name: str, interleave: int) -> Tensor:
    """act(gate) · up for a linear whose outputs are `interleave` channels of the gate and as many
    of up in turn.

    x [batch, tokens, in]. Raises ConfigError when x has another width than the linear.
    """
    packed = linear.packed
    if x.shape[-1] != linear.in_features or x.device != packed.qweight.device:
        raise _refuse("x", x, f"[..., {linear.in_features}] on {packed.qweight.device}")
    return _operator("gated", x)(x, packed, linear.bias, name, interleave)


def cache_prompt(
    qkv: Tensor,
    a: Attention,
    cos: Tensor | None,
    sin: Tensor | None,
    cache: LayerCache,
    start: int,
) -> Tensor:
    """Queries [batch, heads, tokens, head_dim] of a piece of the prompts, whose keys and values go
    into the cache at `start`.

    Raises ConfigError when they do not fit the cache or the rotary tables.
    """
    _check_attention(qkv, a, cos, sin, cache, start + qkv.shape[1])
    compute = plain.split if a.why_no_kernel() else _operator("split", qkv)
    return compute(qkv, a, cos, sin, start, cache.k, cache.v)


def attend_step(
    qkv: Tensor,
    a: Attention,
    cos: Tensor | None,
    sin: Tensor | None,
    cache: LayerCache,
    lengths: Tensor,
    longest: int,
) -> Tensor:
    """Attention of one new token per row over its row of the cache, into which its key and value
    go.

    qkv [batch, 1, channels] → [batch, 1, heads · head_dim]. lengths int32 [batch]: tokens cached so
    far, at most `longest`. Raises ConfigError when they do not fit the cache or the rotary tables.
    """
    _check_attention(qkv, a, cos, sin, cache, longest + 1)
    fits = lengths.dim() == 1 and lengths.size(0) == qkv.size(0)
    if not fits or lengths.dtype != torch.int32 or lengths.device != qkv.device:
        raise _refuse("lengths", lengths, f"int32 [{len(qkv)}] on {qkv.device}")

    compute = plain.attend if a.why_no_kernel() else _operator("attend", qkv)
    out = compute(qkv[:, 0], a, cos, sin, lengths, cache.k, cache.v, longest)

    return out.unsqueeze(1)


def attend_cached(q: Tensor, seen: LayerCache, a: Attention) -> Tensor:
    """Attention of a prompt's last tokens, q [batch, heads, tokens, head_dim], over what is
    cached."""
    return attend(
        q,
        seen.k,
        seen.v,
        a.scaling,
        a.softcap,
        a.window,
        sinks=a.sinks,
    )


def _check_attention(
    qkv: Tensor,
    a: Attention,
    cos: Tensor | None,
    sin: Tensor | None,
    cache: LayerCache,
    places: int,
) -> None:
    """places: how many positions of the cache and of the rotary tables are read or written."""
    if qkv.size(-1) != a.channels:
        wanted = f"[batch, tokens, {a.channels}]"
        raise _refuse("the product of queries, keys and values", qkv, wanted)

    _check_cache(cache.k, qkv, a.kv_heads, places, a.head_dim)
    _check_cache(cache.v, qkv, a.kv_heads, places, a.value_head)
    if cos is not None:
        _check_table(cos, a, places, qkv.device)
    if sin is not None:
        _check_table(sin, a, places, qkv.device)


def _check_cache(kept: Tensor, qkv: Tensor, heads: int, places: int, width: int) -> None:
    """Keys or values [batch, heads, places or more, width]."""
    batch = qkv.size(0)
    rows, kept_heads, positions, kept_width = kept.shape
    if (
        rows != batch
        or kept_heads != heads
        or positions < places
        or kept_width != width
        or kept.dtype != qkv.dtype
        or kept.device != qkv.device
        or not kept.is_contiguous()
    ):
        wanted = (
            f"{qkv.dtype} [{batch}, {heads}, {places} positions or more, {width}] "
            f"on {qkv.device} in one piece"
        )
        raise _refuse("the cache", kept, wanted)


def _check_table(table: Tensor, a: Attention, places: int, device: torch.device) -> None:
    positions, pairs = table.shape
    if (
        positions < places
        or pairs * 2 != a.rotary
        or table.dtype != torch.float32
        or table.device != device
    ):
        wanted = f"float32 [{places} positions or more, {a.rotary // 2}] on {device}"
        raise _refuse("a rotary table", table, wanted)


def head(x: Tensor, module: nn.Module) -> Tensor:
    """Logits float32 [batch, vocabulary] of x [batch, features]."""
    if (
        x.device.type == "cpu"
        and type(module) is nn.Linear
        and module.bias is None
        and len(x) <= MOST_HEAD_ROWS
    ):
        weight = module.weight
        if weight.is_contiguous() and weight.dtype == x.dtype and weight.shape[1] == x.shape[1]:
            return _operator("dense", x)(x, weight)
    return module(x).float()
