"""Reading the structure of a decoder block off its traces, without names and without a table of architectures.

What a tensor is shows in its values: the queries that attention gets are outputs of linears, bit for bit (with neutral rotary
tables), so matching channels tells which linear and which row makes each, whatever the layout: separate, stacked or
interleaved per head. A norm is what its input and output say, an activation what it does to a ramp of numbers, and the
residual stream is where a norm reads what no module wrote. Every guess made here is confirmed by `proof`, or not used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from awq.generate.channels import find_channels, flat, heads_last, owners
from awq.generate.norms import is_norm, read_norm
from awq.generate.plan import Attention, BlockPlan, Norm, NotFusable, Source
from awq.generate.trace import AttentionCall, Event, Trace, rotary_tables
from awq.kernels.reference.attention import rotate
from awq.kernels.reference.decode import ACTIVATIONS
from awq.nn.blocks import BlockCall, is_product

_READ_SETTINGS = {"scaling", "softcap", "sliding_window"}
# What attention may also be told in evaluation mode, with a mask and without a cache, and what then changes nothing.
_IDLE_SETTINGS = {
    "dropout", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
}  # fmt: skip



def read_block(neutral: Trace, real: Trace, call: BlockCall) -> BlockPlan:
    """The plan of a block from a trace with neutral rotary tables and one with its own. Raises NotFusable with the reason."""
    if neutral.attention is None or neutral.calls != 1 or real.attention is None:
        raise NotFusable("attention does not go through transformers' attention interface exactly once per block")
    attention, qkv, tables = _read_attention(neutral, real, call)
    out = next((e for e in neutral.after if is_product(e.module)), None)
    if out is None or not torch.equal(flat(out.x), flat(heads_last(neutral.attention.y))):
        raise NotFusable("attention's output does not go straight into a linear")
    plan = _read_mlp(neutral, attention, qkv, out)
    plan.cos, plan.sin = tables
    _read_residuals(neutral, plan, out)
    return plan


def _read_attention(neutral: Trace, real: Trace, call: BlockCall) -> tuple[Attention, Source, tuple[Tensor | None, Tensor | None]]:
    assert neutral.attention is not None and real.attention is not None
    q, k, v = neutral.attention.q, neutral.attention.k, neutral.attention.v
    settings = _settings(neutral.attention)
    attention = Attention(q.shape[1], k.shape[1], q.shape[-1], settings["scaling"], settings["softcap"], settings["window"], 0)
    linears = [e for e in neutral.before if is_product(e.module)]
    parts = []
    for name, tensor in (("query", q), ("key", k), ("value", v)):
        source, norm = _unnormed(tensor, neutral)
        place = find_channels(flat(heads_last(source)), [flat(e.y) for e in linears])
        if place is None and name == "query":  # scaled before, rather than in, attention
            factor = attention.head_dim**-0.5
            place = find_channels(flat(heads_last(source)), [flat(e.y) * factor for e in linears])
            attention.scaling *= factor
        if place is None:
            raise NotFusable(f"{name} vectors are not outputs of linears, rotated or not")
        parts.append(place)
        if norm is not None:
            if name == "value":
                raise NotFusable("values are normalized")
            setattr(attention, f"{name[0]}_norm", norm)
            attention.norm_heads = source.shape[-1] == _width(norm)
    used, places = owners(torch.cat(parts), [e.y.shape[-1] for e in linears])
    parts = list(places.split([len(p) for p in parts]))
    linears = [linears[i] for i in used]
    if any(not torch.equal(e.x, linears[0].x) for e in linears):
        raise NotFusable("queries, keys and values come from linears with different inputs")
    order, cos, sin = _rotation(neutral.attention, real.attention, call)
    if order is not None:
        attention.rotary = len(order)
        dim = attention.head_dim
        within = torch.cat([order, torch.arange(len(order), dim, device=order.device)])
        for i, heads in ((0, attention.heads), (1, attention.kv_heads)):
            rows = (torch.arange(heads, device=order.device).unsqueeze(1) * dim + within).flatten()
            parts[i] = parts[i][rows]
        for norm in (attention.q_norm, attention.k_norm):
            if norm is not None and not torch.equal(within, torch.arange(dim, device=within.device)):
                if not attention.norm_heads:
                    raise NotFusable("a norm over all heads before an interleaved rotation")
                norm.weight = None if norm.weight is None else norm.weight[within]
                norm.bias = None if norm.bias is None else norm.bias[within]
    return attention, Source(tuple(e.name for e in linears), torch.cat(parts)), (cos, sin)


def _width(norm: Norm) -> int:
    return 0 if norm.weight is None else norm.weight.shape[-1]


def _unnormed(tensor: Tensor, found: Trace) -> tuple[Tensor, Norm | None]:
    """What was normalized to give q, k or v [batch, heads, tokens, head_dim], if anything, and the norm."""
    batch, heads, tokens, dim = tensor.shape
    for event in found.before:
        if not is_norm(event.module) or event.y.numel() != tensor.numel():
            continue
        for by_head in (True, False):
            if torch.equal(_as_heads(event.y, tensor.shape, by_head), tensor):
                norm = read_norm(event.module, event.x, event.y)
                if norm is None:
                    raise NotFusable(f"{event.name} is no norm that is known here")
                return _as_heads(event.x, tensor.shape, by_head), norm
    return tensor, None


def _as_heads(x: Tensor, shape: torch.Size, by_head: bool) -> Tensor:
    batch, heads, tokens, dim = shape
    return x.reshape(shape) if by_head else x.reshape(batch, tokens, heads, dim).transpose(1, 2)


def _settings(call: AttentionCall) -> dict:
    """scaling, softcap and window. Raises NotFusable when attention is told anything that is not known to change nothing."""
    told = call.settings
    others = [name for name, value in told.items() if value is not None and name not in _READ_SETTINGS | _IDLE_SETTINGS]
    if others:
        raise NotFusable(f"attention takes {', '.join(sorted(others))}")
    return {"scaling": float(told["scaling"]), "softcap": told.get("softcap"), "window": told.get("sliding_window")}


def _rotation(neutral: AttentionCall, real: AttentionCall, call: BlockCall) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(order of a head's rotated channels as two halves, cos and sin [batch, tokens, r]), or Nones without rotation."""
    if torch.equal(neutral.q, real.q) and torch.equal(neutral.k, real.k):
        return None, None, None
    for cos, sin in rotary_tables(call).values():
        cos, sin = (t.float().reshape(-1, t.shape[-2], t.shape[-1]) for t in (cos, sin))
        for r, pick in _table_forms(cos):
            if 2 * r > neutral.q.shape[-1]:
                continue
            c, s = cos[..., pick].unsqueeze(1), sin[..., pick].unsqueeze(1)
            for order in (torch.arange(2 * r), torch.arange(2 * r).view(r, 2).t().flatten()):
                order = order.to(cos.device)
                if all(_rotates(a, b, order, c, s) for a, b in ((neutral.q, real.q), (neutral.k, real.k))):
                    return order, c.squeeze(1), s.squeeze(1)
    raise NotFusable("queries and keys are rotated in a way that is not known here")


def _table_forms(cos: Tensor) -> list[tuple[int, slice]]:
    """(r, which columns hold the r frequencies): given twice as halves, twice as neighbours, or once."""
    width = cos.shape[-1]
    forms = [(width, slice(None))]
    if width % 2 == 0:
        if torch.equal(cos[..., : width // 2], cos[..., width // 2 :]):
            forms.insert(0, (width // 2, slice(0, width // 2)))
        if torch.equal(cos[..., 0::2], cos[..., 1::2]):
            forms.insert(0, (width // 2, slice(0, None, 2)))
    return forms


def _rotates(before: Tensor, after: Tensor, order: Tensor, cos: Tensor, sin: Tensor) -> bool:
    count = len(order)
    ours = rotate(torch.cat([before[..., order], before[..., count:]], -1), cos, sin)
    theirs = torch.cat([after[..., order], after[..., count:]], -1)
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


def _read_mlp(found: Trace, attention: Attention, qkv: Source, out: Event) -> BlockPlan:
    linears = [e for e in found.events if is_product(e.module) and e.name not in qkv.names and e is not out]
    if len(linears) < 2:
        raise NotFusable(f"the MLP has {len(linears)} linears, not two or three")
    *first, last = linears
    if any(not torch.equal(e.x, first[0].x) for e in first):
        raise NotFusable("the MLP's first linears do not share one input (a mixture of experts, perhaps)")
    pool = [flat(e.y) for e in first]
    total = sum(p.shape[1] for p in pool)
    for event in found.events:
        if is_product(event.module) or is_norm(event.module) or event.y.shape != event.x.shape:
            continue
        place = find_channels(flat(event.x), pool)
        if place is None or len(place) not in (total, total // 2):
            continue
        gated, rows = len(place) < total, place
        if gated:
            rest = torch.ones(total, dtype=torch.bool, device=place.device)
            rest[place] = False
            rows = torch.cat([place, rest.nonzero().flatten()])
        ours = event.y * torch.cat(pool, 1)[:, rows[len(place) :]].view(event.y.shape) if gated else event.y
        if ours.shape == last.x.shape and torch.allclose(ours, last.x, rtol=1e-4, atol=1e-5 * float(last.x.abs().max())):
            source = Source(tuple(e.name for e in first), rows)
            name = _activation_name(event.module, event.x)
            return BlockPlan(
                attention, qkv, out.name, source, last.name, gated, event.module, name,
                False, 1.0, None, None, None, None,
            )  # fmt: skip
    raise NotFusable("the MLP is not act(gate)·up or act(up) followed by a linear")


def _activation_name(module: nn.Module, x: Tensor) -> str | None:
    """The activation's name in `ACTIVATIONS` if it is one of them over the whole range of numbers."""
    ramp = torch.linspace(-12, 12, 4001, device=x.device)
    y = module(ramp)
    return next((n for n, f in ACTIVATIONS.items() if torch.allclose(f(ramp), y, rtol=1e-5, atol=1e-6)), None)


def _read_residuals(found: Trace, plan: BlockPlan, out: Event) -> None:
    """Norms by what they read and write, and whether the branches follow each other."""
    norms = [e for e in found.events if is_norm(e.module) and e.x.numel() == found.hidden.numel()]
    events = {e.name: e for e in found.events}
    attention_in, mlp_in, last = events[plan.qkv.names[0]].x, events[plan.mlp_in.names[0]].x, events[plan.mlp_out]

    def norm_where(condition: Callable[[Event], bool], what: str) -> tuple[Event | None, Norm | None]:
        event = next((e for e in norms if condition(e)), None)
        norm = read_norm(event.module, event.x, event.y) if event is not None else None
        if event is not None and norm is None:
            raise NotFusable(f"{event.name}, before or after {what}, is no norm that is known here")
        return event, norm

    first, plan.attention_norm = norm_where(lambda e: torch.equal(e.y, attention_in), "attention")
    if not torch.equal(found.hidden, attention_in if first is None else first.x):
        raise NotFusable("attention does not read the block's input")
    post, plan.attention_post_norm = norm_where(lambda e: torch.equal(e.x, out.y), "attention")
    mlp_post, plan.mlp_post_norm = norm_where(lambda e: torch.equal(e.x, last.y), "the MLP")
    branch = out.y if post is None else post.y
    if torch.equal(mlp_in, attention_in):
        plan.parallel, stream = True, found.hidden
    else:
        second, plan.mlp_norm = norm_where(lambda e: torch.equal(e.y, mlp_in), "the MLP")
        stream = (mlp_in if second is None else second.x).view(found.hidden.shape)  # some models flatten the batch here
        plan.parallel = torch.equal(stream, found.hidden)
    final = (last.y if mlp_post is None else mlp_post.y).view(found.hidden.shape)
    if plan.parallel:
        plan.factor = _factor(found.out - found.hidden, branch + final)
    else:
        plan.factor = _factor(stream - found.hidden, branch)


def _factor(sum_: Tensor, branch: Tensor) -> float:
    """f in sum = f · branch; 1 exactly when it is 1 up to rounding."""
    f = float((sum_.double() * branch.double()).sum() / branch.double().square().sum().clamp(min=1e-30))
    if not torch.allclose(sum_, f * branch, rtol=1e-3, atol=1e-4 * float(branch.abs().max())):
        raise NotFusable("the branches are not simply added to the residual stream")
    return 1.0 if abs(f - 1) < 1e-4 else f
