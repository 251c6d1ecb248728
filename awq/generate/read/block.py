"""Reading the structure of a decoder block off its traces, without names and without a table of
architectures.

What a tensor *is* shows in its values. Random hidden states go through a float32 copy of the block,
and every module's input and output is noted (`trace`). Then:

- The queries that attention gets are outputs of linears, bit for bit, once rotary tables are those
  of position 0. So matching channels by value (`channels`) tells which linear and which row makes
  each, whatever the layout: separate projections, one stacked, or one interleaved per head.
- How queries differ between that trace and one with true tables tells the rotation: which channels,
halves or neighbours.
- A norm is what its input and output say (`norms`), and an activation what it does to a ramp of
numbers.
- The residual stream is where a norm reads what no module wrote; what was added to it in between is
a branch:

      x ──┬─ norm ─ qkv ─ attention ─ out ─ (norm) ─ ·f ─ + ──┬─ norm ─ gate·up ─ down ─ (norm) ─ ·f
          ─ + ── y └───────────────────────────────────────────────┘
          └──────────────────────────────────────┘

  or, in parallel blocks, both branches read x and one addition takes both.

Nothing here has to be certain. Every plan is proven against the block before it is used
(`awq.generate.prove`): a wrong guess costs speed, because the model then keeps transformers' own
loop, and never a token. What is left out, because no common model
needs it: attention that does not go through transformers' interface exactly once, values that are
normalized, more than one activation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awq.generate.plan import Attention, BlockPlan, Norm, NotFusable, Source
from awq.generate.read.channels import find_channels, flat, heads_last, owners
from awq.generate.read.mlp import read_mlp
from awq.generate.read.residuals import Branch, read_residuals
from awq.generate.read.settings import settings_of
from awq.generate.read.trace import AttentionCall, Event, Trace, rotary_tables
from awq.kernels.reference.attention import rotate
from awq.nn.block_calls import BlockCall
from awq.nn.blocks import is_product
from awq.nn.norms import is_norm, read_norm


def read_block(neutral: Trace, real: Trace, call: BlockCall) -> BlockPlan:
    """The plan of a block. Raises NotFusable with the reason.

    neutral: a trace with the rotary tables of position 0; real: one with the block's own, which
    `call` holds. The plan's tables are those of the traced positions.
    """
    if neutral.attention is None or neutral.calls != 1 or real.attention is None:
        raise NotFusable(
            "attention does not go through transformers' attention interface exactly once per block"
        )

    projections = _read_projections(neutral, neutral.attention)
    rotation = _read_rotation(neutral.attention, real.attention, call)
    attention, qkv = _as_halves(projections, rotation)
    out = _output_of_attention(neutral, neutral.attention)
    own = set(qkv.names) | {out.name}
    mlp = read_mlp(neutral, [event for event in neutral.events if event.name not in own])
    entry = next(event for event in neutral.events if event.name == qkv.names[0])
    residuals = read_residuals(neutral, Branch(entry.x, out.y), Branch(mlp.x, mlp.y))

    return residuals.plan(
        attention=attention,
        qkv=qkv,
        attention_out=out.name,
        mlp=mlp.plan,
        cos=None if rotation is None else rotation.cos,
        sin=None if rotation is None else rotation.sin,
    )


def _output_of_attention(found: Trace, attention: AttentionCall) -> Event:
    """The linear that attention's output goes into."""
    out = next((event for event in found.after if is_product(event.module)), None)
    if out is None or not torch.equal(flat(out.x), flat(heads_last(attention.y))):
        raise NotFusable("attention's output does not go straight into a linear")
    return out


# Queries, keys and values


@dataclass(frozen=True)
class _Projections:
    """attention: without rotation. names: of the linears. query, key, value: rows of their outputs,
    side by side."""

    attention: Attention
    names: tuple[str, ...]
    query: Tensor
    key: Tensor
    value: Tensor


def _read_projections(found: Trace, call: AttentionCall) -> _Projections:
    settings = settings_of(call)
    tokens = call.q.shape[0] * call.q.shape[2]
    linears = [
        event
        for event in found.before
        if is_product(event.module) and flat(event.y).shape[0] == tokens
    ]
    query, q_norm, q_by_head = _unnormed(call.q, found)
    key, k_norm, k_by_head = _unnormed(call.k, found)
    value, v_norm, _ = _unnormed(call.v, found)
    if v_norm is not None:
        raise NotFusable("values are normalized")

    factor = 1.0
    rows = find_channels(flat(heads_last(query)), [flat(event.y) for event in linears])
    if rows is None:  # scaled before, rather than in, attention
        factor = call.q.shape[-1] ** -0.5
        rows = find_channels(flat(heads_last(query)), [flat(event.y) * factor for event in linears])

    places = [rows] + [
        find_channels(flat(heads_last(x)), [flat(event.y) for event in linears])
        for x in (key, value)
    ]
    for name, place in zip(("query", "key", "value"), places):
        if place is None:
            raise NotFusable(f"{name} vectors are not outputs of linears, rotated or not")

    known: list[Tensor] = places  # type: ignore[assignment]

    used, rows = owners(torch.cat(known), [event.y.shape[-1] for event in linears])
    linears = [linears[i] for i in used]
    if any(not torch.equal(event.x, linears[0].x) for event in linears):
        raise NotFusable("queries, keys and values come from linears with different inputs")

    attention = Attention(
        heads=call.q.shape[1],
        kv_heads=call.k.shape[1],
        head_dim=call.q.shape[-1],
        value_dim=call.v.shape[-1],
        rotary=0,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_heads=q_by_head and k_by_head,
        **settings | {"scaling": settings["scaling"] * factor},
    )
    return _Projections(
        attention,
        tuple(event.name for event in linears),
        *rows.split([len(place) for place in known]),
    )


def _unnormed(tensor: Tensor, found: Trace) -> tuple[Tensor, Norm | None, bool]:
    """What was normalized to give q, k or v [batch, heads, tokens, head_dim], if anything, the
    norm, and whether it is of each head, not of all heads together."""
    for event in found.before:
        if not is_norm(event.module) or event.y.numel() != tensor.numel():
            continue
        for by_head in (True, False):
            if torch.equal(_as_heads(event.y, tensor.shape, by_head), tensor):
                norm = read_norm(event.module, event.x, event.y)
                if norm is None:
                    raise NotFusable(f"{event.name} is no norm that is known here")
                return (
                    _as_heads(event.x, tensor.shape, by_head),
                    norm,
                    event.x.shape[-1] == tensor.shape[-1],
                )
    return tensor, None, True


def _as_heads(x: Tensor, shape: torch.Size, by_head: bool) -> Tensor:
    batch, heads, tokens, dim = shape
    if by_head:
        return x.reshape(shape)
    return x.reshape(batch, tokens, heads, dim).transpose(1, 2)


# Rotation


@dataclass(frozen=True)
class _Rotation:
    """order: a head's rotated channels as two halves. cos, sin: float32 [batch or 1, tokens,
    rotary/2]."""

    order: Tensor
    cos: Tensor
    sin: Tensor


def _read_rotation(
    neutral: AttentionCall,
    real: AttentionCall,
    call: BlockCall,
) -> _Rotation | None:
    """How queries and keys differ between the traces; None where they do not."""
    pairs = ((neutral.q, real.q), (neutral.k, real.k))
    if all(torch.equal(before, after) for before, after in pairs):
        return None

    for cos, sin in rotary_tables(call).values():
        cos, sin = (table.float().reshape(-1, *table.shape[-2:]) for table in (cos, sin))
        for half, columns in _table_forms(cos):
            if 2 * half > neutral.q.shape[-1]:
                continue

            c = cos[..., columns]
            s = sin[..., columns]
            for order in _channel_orders(half, cos.device):
                if all(
                    _rotates(before, after, order, c.unsqueeze(1), s.unsqueeze(1))
                    for before, after in pairs
                ):
                    return _Rotation(order, c, s)

    raise NotFusable("queries and keys are rotated in a way that is not known here")


def _channel_orders(half: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pairs that rotate together, as two halves: they lie half a head apart, or they are
    neighbours."""
    together = torch.arange(2 * half, device=device)
    return together, together.view(half, 2).t().flatten()


def _table_forms(cos: Tensor) -> list[tuple[int, slice]]:
    """(r, which columns hold the r frequencies): given twice as halves, twice as neighbours, or
    once."""
    width = cos.shape[-1]
    once = (width, slice(None))
    if width % 2:
        return [once]

    forms = [once]
    half = width // 2
    left, right = cos.split(half, -1)
    if torch.equal(left, right):
        forms.insert(0, (half, slice(0, half)))
    if torch.equal(cos[..., 0::2], cos[..., 1::2]):
        forms.insert(0, (half, slice(0, None, 2)))

    return forms


def _rotates(before: Tensor, after: Tensor, order: Tensor, cos: Tensor, sin: Tensor) -> bool:
    count = len(order)
    ours = rotate(torch.cat([before[..., order], before[..., count:]], -1), cos, sin)
    theirs = torch.cat([after[..., order], after[..., count:]], -1)
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


def _as_halves(found: _Projections, rotation: _Rotation | None) -> tuple[Attention, Source]:
    """Attention and its channels, those of a rotated head put in the order of two halves."""
    attention = found.attention
    if rotation is None:
        return attention, Source(found.names, torch.cat([found.query, found.key, found.value]))

    dim = attention.head_dim
    order = rotation.order
    unrotated = torch.arange(len(order), dim, device=order.device)
    within = torch.cat([order, unrotated])
    queries = found.query.view(attention.heads, dim)
    keys = found.key.view(attention.kv_heads, dim)
    query = queries[:, within].flatten()
    key = keys[:, within].flatten()
    attention = replace(
        attention,
        rotary=len(order),
        q_norm=_reordered(attention.q_norm, within, attention),
        k_norm=_reordered(attention.k_norm, within, attention),
    )

    return attention, Source(found.names, torch.cat([query, key, found.value]))


def _reordered(norm: Norm | None, within: Tensor, attention: Attention) -> Norm | None:
    """The norm of heads whose channels come in the order `within`."""
    if norm is None or torch.equal(within, torch.arange(len(within), device=within.device)):
        return norm
    if not attention.norm_heads:
        raise NotFusable("a norm over all heads before an interleaved rotation")

    weight = None if norm.weight is None else norm.weight[within]
    bias = None if norm.bias is None else norm.bias[within]

    return replace(norm, weight=weight, bias=bias)
