"""How the blocks of an encoder attend, read off their values.

Which linears give queries, keys and values, and who sees whom. There are two sources. The watched
forward (`observe`) has the outputs of the linears and what the output linear was given, which must
be

    softmax(rotated(normed(q)) · rotated(normed(k))ᵀ · scaling + bias) · v

for one of the few ways to fill that in. And a skeleton pass, in which blocks do nothing, shows at
the full length what blocks are given beside their hidden states: rotary tables of all positions,
and masks, which say how far a token sees.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from awq.embed.observe import Event, NotReadable, near, norm_of
from awq.generate.read.trace import rotary_tables
from awq.kernels.reference.decode import apply_norm
from awq.kernels.specs import Norm
from awq.nn.block_calls import BlockCall
from awq.nn.linear import WQLinear

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AttentionPlan:
    """How one block attends.

    qkv: linears whose outputs, joined in this order, are queries, keys and values of `dim` channels
    a head. rotary: cos and sin float32 [positions, pairs] of channels that lie `pairs` apart, or
    None. q_norm, k_norm: of each head, before the rotation. causal: a token sees none after it.
    window: the largest distance it sees, None for all.
    """

    qkv: tuple[WQLinear, ...]
    kv_heads: int
    dim: int
    scaling: float
    rotary: Rotary | None
    q_norm: Norm | None
    k_norm: Norm | None
    causal: bool
    window: int | None


@dataclass(frozen=True)
class Sight:
    """Who sees whom: see `AttentionPlan`."""

    causal: bool
    window: int | None = None


@dataclass(frozen=True)
class Surroundings:
    """What a block is given: rotary tables, and what its mask says; None without one."""

    tables: tuple[Rotary, ...]
    sight: Sight | None


@dataclass(frozen=True)
class _Way:
    """One way to attend, without the linears."""

    rotary: Rotary | None
    scaling: float
    sight: Sight


def read_surroundings(call: BlockCall, short: BlockCall) -> Surroundings:
    """call: of the longest text; short: of a short one.

    Raises NotReadable when tables depend on a text's length.
    """
    beginnings = rotary_tables(short)

    tables = []
    for name, pair in rotary_tables(call).items():
        table = _as_table(pair)
        beginning = _as_table(beginnings[name])
        tokens = len(beginning[0])
        same = [torch.equal(whole[:tokens], part) for whole, part in zip(table, beginning)]
        if not all(same):
            raise NotReadable("its rotary tables depend on the length of the text")
        tables.append(table)

    return Surroundings(tuple(tables), _sight(call))


def _as_table(pair: Rotary) -> Rotary:
    """cos and sin [1, positions, channels] as float32 [positions, pairs]."""
    cos, sin = (table.float().reshape(-1, table.shape[-1]) for table in pair)
    pairs = cos.shape[-1] // 2
    if torch.equal(cos[:, :pairs], cos[:, pairs:]):  # every frequency is given twice
        cos = cos[:, :pairs]
        sin = sin[:, :pairs]

    return cos.contiguous(), sin.contiguous()


def _sight(call: BlockCall) -> Sight | None:
    """What a mask [1, 1, tokens, tokens] says. Raises NotReadable."""
    mask = _mask(call)
    if mask is None:
        return None

    seen = mask if mask.dtype == torch.bool else mask >= 0
    tokens = len(seen)
    ahead = int(seen[0].sum()) - 1
    back = int(seen[-1].sum()) - 1
    expected = torch.ones(tokens, tokens, dtype=torch.bool).tril(ahead).triu(-back)
    if not torch.equal(seen, expected) or ahead not in (0, back):
        raise NotReadable("its mask is neither causal nor a window of equal sides")
    return Sight(ahead == 0, None if back == tokens - 1 else back)


def _mask(call: BlockCall) -> Tensor | None:
    """[tokens, tokens]"""
    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, Tensor) and value.dim() == 4:
            rows, heads, queries, keys = value.shape
            if heads == 1 and queries == keys > 1:
                return value[0, 0]
    return None


def read_attention(
    linears: list[Event],
    norms: list[Event],
    context: Tensor,
    heads: int,
    around: Surroundings,
    relative: Tensor | None,
) -> AttentionPlan:
    """linears: those that read what attention reads; norms: those that read outputs of theirs.

    context [1, tokens, heads · dim]: what the output linear was given. relative: bias float32
    [heads, 2·n − 1] by distance, or None. Raises NotReadable.
    """
    width = context.shape[-1]
    dim = width // heads

    ways = list(_ways(around, dim))
    for qkv, parts in _orders(linears, width):
        q, q_norm = _normed(parts[0], norms, dim)
        k, k_norm = _normed(parts[1], norms, dim)
        v = _by_head(parts[2], dim)
        for way in ways:
            if near(_attend(q, k, v, way, relative), context[0].float()):
                return AttentionPlan(
                    qkv=qkv,
                    kv_heads=len(k),
                    dim=dim,
                    scaling=way.scaling,
                    rotary=way.rotary,
                    q_norm=q_norm,
                    k_norm=k_norm,
                    causal=way.sight.causal,
                    window=way.sight.window,
                )

    raise NotReadable("its attention is not softmax(q · kᵀ) · v of what its linears give")


def _ways(around: Surroundings, dim: int) -> Iterator[_Way]:
    """The common ones first."""
    rotaries: list[Rotary | None] = [t for t in around.tables if 2 * t[0].shape[1] <= dim]
    rotaries.append(None)
    scalings = (dim**-0.5, 1.0)
    sights = [Sight(False), Sight(True)]
    if around.sight is not None:
        sights = [around.sight]
    for scaling, rotary, sight in itertools.product(scalings, rotaries, sights):
        yield _Way(rotary, scaling, sight)


def _orders(
    linears: list[Event], width: int
) -> Iterator[tuple[tuple[WQLinear, ...], list[Tensor]]]:
    """(linears, [queries, keys, values]) in every order that is possible by width.

    Queries, keys and values are float32 [tokens, channels].
    """
    outputs = [e.y[0].float() for e in linears]
    modules = [packed(e) for e in linears]
    if len(linears) == 1:
        rest = outputs[0].shape[-1] - width
        if rest > 0 and rest % 2 == 0:
            yield tuple(modules), list(outputs[0].split([width, rest // 2, rest // 2], -1))
        return
    if len(linears) != 3:
        raise NotReadable(f"{len(linears)} linears read what attention reads")
    for order in itertools.permutations(range(3)):
        q, k, v = (outputs[i] for i in order)
        if q.shape[-1] == width and k.shape == v.shape and width % k.shape[-1] == 0:
            yield tuple(modules[i] for i in order), [q, k, v]


def packed(event: Event) -> WQLinear:
    """The packed linear that was called."""
    assert isinstance(event.module, WQLinear)
    return event.module


def _by_head(x: Tensor, dim: int) -> Tensor:
    """[tokens, heads · dim] → [heads, tokens, dim]"""
    return x.unflatten(-1, (-1, dim)).transpose(0, 1)


def _normed(x: Tensor, norms: list[Event], dim: int) -> tuple[Tensor, Norm | None]:
    """(heads [heads, tokens, dim] of x [tokens, heads · dim], their norm if one read them)."""
    heads = _by_head(x, dim)
    for event in norms:
        if event.x.shape[-1] == dim and _reads(event, x):
            norm = norm_of(event)
            return apply_norm(heads, norm), norm
    return heads, None


def reads_heads(event: Event, linears: list[Event]) -> bool:
    """Whether a norm reads what one of the linears made, head by head."""
    return any(_reads(event, e.y[0]) for e in linears)


def _reads(event: Event, made: Tensor) -> bool:
    """Whether a norm reads made [tokens, channels], heads before tokens or after them."""
    if event.x.numel() != made.numel():
        return False

    layouts = [event.x]
    if event.x.dim() == 4:
        layouts.append(event.x.transpose(1, 2))
    return any(near(x.reshape(made.shape), made) for x in layouts)


def _attend(q: Tensor, k: Tensor, v: Tensor, way: _Way, relative: Tensor | None) -> Tensor:
    """[tokens, heads · dim] of q, k and v [heads, tokens, dim]."""
    heads, tokens, _ = q.shape
    repeats = heads // len(k)
    if way.rotary is not None:
        q = _rotate(q, way.rotary)
        k = _rotate(k, way.rotary)

    k = k.repeat_interleave(repeats, 0)
    v = v.repeat_interleave(repeats, 0)
    scores = q @ k.transpose(1, 2) * way.scaling
    places = torch.arange(tokens)
    distance = places - places[:, None]
    if relative is not None:
        scores = scores + relative[:, distance + relative.shape[1] // 2]

    scores = scores.masked_fill(_hidden(distance, way.sight), float("-inf"))
    context = scores.softmax(-1) @ v

    return context.transpose(0, 1).flatten(1)


def _hidden(distance: Tensor, sight: Sight) -> Tensor:
    """Whether a token does not see one at that distance."""
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if sight.causal:
        hidden |= distance > 0
    if sight.window is not None:
        hidden |= distance.abs() > sight.window

    return hidden


def _rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """x [heads, tokens, dim], its first 2 · pairs channels rotated."""
    cos, sin = (table[: x.shape[1]] for table in rotary)
    pairs = cos.shape[-1]
    left, right, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], -1)
