"""What a text encoder is, read off one forward of it: the tables, linears and norms, and how each
block joins them.

No family is known by name. A short text runs through the model while every linear, norm and
embedding notes what it was given and what it made. From these the reader tells who feeds whom:
which linears take what the block was given, in which order their outputs are queries, keys and
values, whether a norm comes before or after the residual sum, which activation lies between two
linears. What it cannot tell raises `NotReadable` with the reason. A plan is a guess that fits one
text; `compiled` proves it on others before it is used.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awq.nn.blocks import find_block_lists, hidden_of, is_product
from awq.nn.linear import WQLinear

PROBE_TOKENS = 24
READING_ERROR = 3e-2  # relative: models compute in 16 bits
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


class NotReadable(Exception):
    """The structure is none that is known here; the message says what."""


@dataclass(frozen=True)
class NormPlan:
    """weight, bias float32 [width]; centered: LayerNorm, else RMSNorm."""

    weight: Tensor
    bias: Tensor
    eps: float
    centered: bool


@dataclass(frozen=True)
class BlockPlan:
    """qkv, up: linears whose outputs are joined in this order. norms: after attention and MLP, or
    before them."""

    qkv: tuple[WQLinear, ...]
    o: WQLinear
    up: tuple[WQLinear, ...]
    down: WQLinear
    attention_norm: NormPlan | None
    mlp_norm: NormPlan
    activation: str
    gated: bool
    pre_norm: bool
    window: int | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    scaling: float = 0.0


@dataclass(frozen=True)
class EncoderPlan:
    """words, positions, types: tables [entries, hidden], the latter two float32 or None.

    position_offset: index of the first token's row. relative: bias float32 [heads, 2·n − 1] by
    distance, or None.
    """

    words: Tensor
    positions: Tensor | None
    position_offset: int
    types: Tensor | None
    norm: NormPlan | None
    final_norm: NormPlan | None
    blocks: tuple[BlockPlan, ...]
    heads: int
    relative: Tensor | None
    longest: int


@dataclass
class _Event:
    module: nn.Module
    x: Tensor
    y: Tensor


@torch.no_grad()
def read_encoder(model: Any) -> EncoderPlan:
    """The plan of a transformers encoder in evaluation mode. Raises NotReadable."""
    if model.training:
        raise NotReadable("the model is in training mode")
    lists = find_block_lists(model)
    if len(lists) != 1:
        raise NotReadable(f"it has {len(lists)} lists of blocks")
    blocks = list(lists[0][1])
    words = model.get_input_embeddings()
    ids = torch.randint(min(5, words.num_embeddings - 1), words.num_embeddings, (1, PROBE_TOKENS))
    events, outputs, inputs, last = _observe(model, blocks, ids)
    heads = getattr(model.config, "num_attention_heads", None)
    if not heads:
        raise NotReadable("its config does not say how many heads attention has")
    relative = _relative_bias(model, heads)
    plans = [
        _read_block(block, events[block], inputs[block], outputs[block], int(heads), relative)
        for block in blocks
    ]
    tables = _read_tables(model, words, events[model], ids, inputs[blocks[0]])
    if len({(p.pre_norm, p.gated, p.activation) for p in plans}) > 1:
        raise NotReadable("its blocks differ")
    final = _final_norm(events[model], outputs[blocks[-1]], last, plans[0].pre_norm)
    longest = getattr(model.config, "max_position_embeddings", None) or 512
    if tables["positions"] is not None:
        longest = min(longest, len(tables["positions"]) - tables["position_offset"])
    return EncoderPlan(
        words=words.weight,
        final_norm=final,
        blocks=tuple(plans),
        heads=int(heads),
        relative=relative,
        longest=longest,
        **tables,
    )


def _observe(model: Any, blocks: list[nn.Module], ids: Tensor) -> tuple[dict, dict, dict, Tensor]:
    """(events by block, and of the rest under the model; each block's output and input; the last
    hidden state)."""
    events: dict[nn.Module, list[_Event]] = {block: [] for block in blocks} | {model: []}
    outputs: dict[nn.Module, Tensor] = {}
    inputs: dict[nn.Module, Tensor] = {}
    handles = []

    def watch(module: nn.Module, owner: nn.Module) -> None:
        def note(_module: nn.Module, args: tuple, output: Any) -> None:
            if args and isinstance(output, Tensor):
                events[owner].append(
                    _Event(module, args[0].detach().clone(), output.detach().clone())
                )

        handles.append(module.register_forward_hook(note))

    inner: set[nn.Module] = set()
    for block in blocks:
        own = {m for m in block.modules() if is_product(m) or is_norm(m)}
        inner |= set(block.modules())
        for module in own:
            watch(module, block)

        def note_block(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            inputs[module], outputs[module] = (
                given.detach().clone(),
                hidden_of(output).detach().clone(),
            )

        handles.append(block.register_forward_hook(note_block, with_kwargs=True))
    for module in model.modules():
        if module not in inner and (isinstance(module, nn.Embedding) or is_norm(module)):
            watch(module, model)
    try:
        last = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return events, outputs, inputs, last


def is_norm(module: nn.Module) -> bool:
    """Whether a leaf is a norm with a weight, by what it holds."""
    if list(module.children()) or isinstance(module, nn.Embedding) or is_product(module):
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


def near(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of 16-bit models."""
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    return bool((a - b).norm() <= READING_ERROR * b.norm())


def read_norm(event: _Event) -> NormPlan:
    """LayerNorm or RMSNorm, whichever the numbers say. Raises NotReadable."""
    module: Any = event.module
    weight = module.weight.detach().float()
    bias = getattr(module, "bias", None)
    bias = torch.zeros_like(weight) if bias is None else bias.detach().float()
    eps = next(
        (
            float(getattr(module, n))
            for n in ("eps", "variance_epsilon")
            if getattr(module, n, None)
        ),
        0.0,
    )
    x = event.x.float()
    for scale in (weight, weight + 1):
        if near(F.layer_norm(x, x.shape[-1:], scale, bias, eps), event.y.float()):
            return NormPlan(scale, bias, eps, True)
        if near(F.rms_norm(x, x.shape[-1:], scale, eps) + bias, event.y.float()):
            return NormPlan(scale, bias, eps, False)
    raise NotReadable(f"{type(module).__name__} is neither LayerNorm nor RMSNorm")


def _read_block(
    block: nn.Module,
    events: list[_Event],
    given: Tensor,
    made: Tensor,
    heads: int,
    relative: Tensor | None,
) -> BlockPlan:
    linears = [e for e in events if is_product(e.module)]
    norms = [e for e in events if is_norm(e.module)]
    dense = [e for e in linears if not isinstance(e.module, WQLinear)]
    if dense:
        raise NotReadable(f"a linear of {dense[0].module} is not quantized")
    if len(linears) < 4 or not norms:
        raise NotReadable(f"a block has {len(linears)} linears and {len(norms)} norms")
    first = linears[0].x
    attention = [e for e in linears if near(e.x, first) and e.x.shape == first.shape][:3]
    o, *mlp = linears[len(attention) :]
    if not mlp:
        raise NotReadable("a block has no MLP")
    up, down = mlp[:-1], mlp[-1]
    activation, gated, up = _activation(up, down)
    pre_norm, attention_norm, mlp_norm = _norms(norms, given, made, attention[0], o, up[0], down)
    scaling = 1 / math.sqrt(o.x.shape[-1] / heads)
    qkv = _queries_keys_values(attention, o.x, heads, scaling, relative)
    return BlockPlan(
        qkv,
        _packed(o),
        tuple(_packed(e) for e in up),
        _packed(down),
        attention_norm,
        mlp_norm,
        activation,
        gated,
        pre_norm,
        scaling=scaling,
    )


def _packed(event: _Event) -> WQLinear:
    assert isinstance(event.module, WQLinear)
    return event.module


def _norms(
    norms: list[_Event], given: Tensor, made: Tensor, q: _Event, o: _Event, up: _Event, down: _Event
) -> tuple[bool, NormPlan | None, NormPlan]:
    """(whether norms come first, the norm of attention, that of the MLP)."""
    if len(norms) == 2:
        one, two = norms
        if (
            near(q.x, given)
            and near(one.x, given + o.y)
            and near(up.x, one.y)
            and near(two.x, one.y + down.y)
        ):
            if not near(made, two.y):
                raise NotReadable("a block gives something else than its last norm")
            return False, read_norm(one), read_norm(two)
        if (
            near(one.x, given)
            and near(q.x, one.y)
            and near(two.x, given + o.y)
            and near(up.x, two.y)
        ):
            if not near(made, two.x + down.y):
                raise NotReadable("a block gives something else than its residual sum")
            return True, read_norm(one), read_norm(two)
    if (
        len(norms) == 1
        and near(q.x, given)
        and near(norms[0].x, given + o.y)
        and near(up.x, norms[0].y)
    ):
        return True, None, read_norm(norms[0])
    raise NotReadable("its norms lie somewhere else than before or after attention and MLP")


def _activation(up: list[_Event], down: _Event) -> tuple[str, bool, list[_Event]]:
    """(name, gated, the linears in the order gate, up)."""
    for name, act in ACTIVATIONS.items():
        if len(up) == 1 and near(act(up[0].y.float()), down.x.float()):
            return name, False, up
        halves = [e.y.float() for e in up] if len(up) == 2 else list(up[0].y.float().chunk(2, -1))
        for order in ((0, 1), (1, 0)):
            gate, value = (halves[i] for i in order)
            if near(act(gate) * value, down.x.float()) and (len(up) == 2 or order == (0, 1)):
                return name, True, [up[i] for i in order] if len(up) == 2 else up
    raise NotReadable("its MLP is neither plain nor gated with an activation that is known here")


def _heads(x: Tensor, heads: int) -> Tensor:
    """[1, tokens, heads · dim] → [heads, tokens, dim], float32."""
    return x[0].float().unflatten(-1, (heads, -1)).transpose(0, 1)


def _queries_keys_values(
    events: list[_Event], context: Tensor, heads: int, scaling: float, relative: Tensor | None
) -> tuple[WQLinear, ...]:
    """The linears in the order q, k, v: the one whose attention is what the output linear was
    given."""
    tokens = context.shape[1]
    bias: Any = 0.0
    if relative is not None:
        middle = relative.shape[1] // 2
        distance = torch.arange(tokens)[None] - torch.arange(tokens)[:, None]
        bias = relative[:, distance + middle]
    if len(events) != 3:
        raise NotReadable(f"{len(events)} linears read what attention reads")
    for order in itertools.permutations(range(3)):
        if any(events[i].y.shape != context.shape for i in order):
            continue
        q, k, v = (_heads(events[i].y, heads) for i in order)
        weights = (q @ k.transpose(1, 2) * scaling + bias).softmax(-1)
        found = (weights @ v).transpose(0, 1).flatten(1)
        if near(found, context[0].float()):
            return tuple(_packed(events[i]) for i in order)
    raise NotReadable("its attention is not softmax(q · kᵀ) · v of three linears")


def _relative_bias(model: Any, heads: int) -> Tensor | None:
    """float32 [heads, 2·n − 1] of a bias that depends on the distance of two tokens, or None."""
    tables = [
        m
        for m in model.modules()
        if isinstance(m, nn.Embedding)
        and m.embedding_dim == heads
        and m is not model.get_input_embeddings()
    ]
    if not tables:
        return None
    owner = next(m for m in model.modules() if any(child is tables[0] for child in m.children()))
    compute: Any = getattr(owner, "compute_position_bias", None)
    longest = min(int(getattr(model.config, "max_position_embeddings", 512)), 2048)
    if compute is None:
        raise NotReadable("it adds a bias to attention whose table nobody reads here")
    whole = compute(torch.zeros(1, longest, 1, dtype=tables[0].weight.dtype))[0].float()
    return torch.cat([whole[:, 1:, 0].flip(1), whole[:, 0, :]], 1).contiguous()


def _read_tables(
    model: Any, words: nn.Module, events: list[_Event], ids: Tensor, given: Tensor
) -> dict[str, Any]:
    tables = [e for e in events if isinstance(e.module, nn.Embedding) and e.module is not words]
    tables = [e for e in tables if e.module.embedding_dim == words.embedding_dim]  # type: ignore[union-attr]
    first = next(e for e in events if e.module is words)
    total = first.y.float()
    positions: Tensor | None = None
    types: Tensor | None = None
    offset = 0
    for event in tables:
        rows = (
            event.x.reshape(-1)[-PROBE_TOKENS:]
            if event.x.numel() >= PROBE_TOKENS
            else event.x.reshape(-1)
        )
        module: Any = event.module
        table = module.weight.detach().float()
        if len(rows) == PROBE_TOKENS and torch.equal(rows - rows[0], torch.arange(PROBE_TOKENS)):
            positions, offset = table, int(rows[0])
        elif not rows.any():
            types = table
        else:
            raise NotReadable(
                "it adds an embedding that depends on more than word, position and type"
            )
        total = total + event.y.float()
    norms = [e for e in events if is_norm(e.module) and near(e.y, given)]
    norm = None
    if norms:
        total_, norm = norms[0].x.float(), read_norm(norms[0])
        if not near(total.expand_as(total_), total_):
            raise NotReadable("what its first norm reads is not the sum of its embeddings")
    elif not near(total, given.float()):
        raise NotReadable("what its first block reads is not the sum of its embeddings")
    return {"positions": positions, "position_offset": offset, "types": types, "norm": norm}


def _final_norm(
    events: list[_Event], made: Tensor, last: Tensor, pre_norm: bool
) -> NormPlan | None:
    if near(made, last):
        return None
    for event in events:
        if is_norm(event.module) and near(event.x, made) and near(event.y, last) and pre_norm:
            return read_norm(event)
    raise NotReadable("something lies between its last block and what it gives")
