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

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.embed.attention import (
    AttentionPlan,
    Surroundings,
    packed,
    read_attention,
    read_surroundings,
    reads_heads,
)
from awq.embed.observe import (
    READING_ERROR,
    BlockEvents,
    Event,
    NotReadable,
    distance,
    near,
    norm_of,
    observe,
)
from awq.embed.tables import final_norm, read_tables, relative_bias
from awq.kernels.specs import Norm
from awq.nn.block_calls import BlockCall, map_tensors
from awq.nn.blocks import BlockList, find_block_lists, is_product
from awq.nn.copies import copy_structure
from awq.nn.linear import WQLinear
from awq.nn.norms import is_norm
from awq.nn.recording import record_block_calls

PROBE_TOKENS = 24
MAX_TOKENS = 4096  # the mask of a longer text would take much memory to read
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


@dataclass(frozen=True)
class BlockPlan:
    """up: linears whose outputs are joined in this order, gate first.

    Norms lie after attention and MLP, or before them; post_norms: of what both give, before it is
    added.
    """

    attention: AttentionPlan
    o: WQLinear
    up: tuple[WQLinear, ...]
    down: WQLinear
    attention_norm: Norm | None
    mlp_norm: Norm
    post_norms: tuple[Norm, ...] | None
    activation: str
    gated: bool
    pre_norm: bool


@dataclass(frozen=True)
class EncoderPlan:
    """words, positions, types: tables [entries, hidden], the latter two float32 or None.

    words_factor: what rows of words are multiplied by. position_offset: index of the first token's
    row. relative: bias float32 [heads, 2·n − 1] by distance, or None.
    """

    words: Tensor
    words_factor: float
    positions: Tensor | None
    position_offset: int
    types: Tensor | None
    norm: Norm | None
    final_norm: Norm | None
    blocks: tuple[BlockPlan, ...]
    heads: int
    relative: Tensor | None
    longest: int


@torch.no_grad()
def read_encoder(model: Any) -> EncoderPlan:
    """The plan of a transformers encoder in evaluation mode. Raises NotReadable.

    Other threads may run the model meanwhile: hooks and other forwards go into a copy
    of its modules.
    """
    if model.training:
        raise NotReadable("the model is in training mode")

    heads = getattr(model.config, "num_attention_heads", None)
    if not heads:
        raise NotReadable("its config does not say how many heads attention has")

    twin = copy_structure(model)
    lists = find_block_lists(twin)
    if len(lists) != 1:
        raise NotReadable(f"it has {len(lists)} lists of blocks")

    words = twin.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        min(5, words.num_embeddings - 1),
        words.num_embeddings,
        (1, PROBE_TOKENS),
        generator=generator,
    )
    seen = observe(twin, list(lists[0][1]), ids)
    first = seen.blocks[0]
    last = seen.blocks[-1]
    tables = read_tables(words, seen.around, first.given, PROBE_TOKENS)
    longest = min(getattr(model.config, "max_position_embeddings", None) or 512, MAX_TOKENS)
    if tables.positions is not None:
        longest = min(longest, len(tables.positions) - tables.position_offset)

    relative = relative_bias(twin, heads)
    around = _surroundings(twin, lists, ids, longest)
    linears = [_read_linears(block) for block in seen.blocks]
    form = _mlp_form(linears)

    plans = []
    for block, own, given in zip(seen.blocks, linears, around):
        attention = read_attention(
            own.attention, _head_norms(block, own), own.o.x, int(heads), given, relative
        )
        plans.append(_read_block(block, own, form, attention))

    if len({(plan.pre_norm, plan.post_norms is None) for plan in plans}) > 1:
        raise NotReadable("norms lie elsewhere in some of its blocks than in others")

    final = final_norm(seen.around, last.made, seen.last, plans[0].pre_norm)
    return EncoderPlan(
        words=words.weight,
        words_factor=tables.words_factor,
        positions=tables.positions,
        position_offset=tables.position_offset,
        types=tables.types,
        norm=tables.norm,
        final_norm=final,
        blocks=tuple(plans),
        heads=int(heads),
        relative=relative,
        longest=longest,
    )


def _surroundings(
    model: Any,
    lists: list[BlockList],
    ids: Tensor,
    longest: int,
) -> list[Surroundings]:
    """What each block is given at the full length; equal rotary tables are one tensor."""
    repeats = -(-longest // PROBE_TOKENS)
    whole = ids.repeat(1, repeats)[:, :longest]
    short_ids = ids[:, :longest]
    inputs = [{"input_ids": whole}, {"input_ids": short_ids}]
    long, short = record_block_calls(model, lists, inputs).calls[0]

    known: dict[tuple[int, ...], Surroundings] = {}
    for call, brief in zip(long, short):
        key = _identity(call)
        if key not in known:
            known[key] = read_surroundings(call, brief)

    return [known[_identity(call)] for call in long]


def _identity(call: BlockCall) -> tuple[int, ...]:
    """Equal for calls that are given the same tensors."""
    found: list[int] = []
    map_tensors((call.args, call.kwargs), lambda tensor: found.append(id(tensor)))
    return tuple(found)


@dataclass(frozen=True)
class _Linears:
    """The calls of a block's linears. attention: those that read what attention reads."""

    attention: list[Event]
    o: Event
    up: list[Event]
    down: Event


_Choice = tuple[bool, tuple[int, ...]]  # gated, order of the first linears


@dataclass(frozen=True)
class _Form:
    """What an MLP computes. order: of its first linears, gate first."""

    activation: str
    gated: bool
    order: tuple[int, ...]


def _read_linears(calls: BlockEvents) -> _Linears:
    linears = [e for e in calls.events if is_product(e.module)]
    dense = [e for e in linears if not isinstance(e.module, WQLinear)]
    if dense:
        raise NotReadable(f"a linear of {dense[0].module} is not quantized")
    if len(linears) < 4:
        raise NotReadable(f"a block has {len(linears)} linears")

    first = linears[0].x
    # Bit for bit: what the MLP reads may be near it, where attention adds little.
    attention = [e for e in linears if torch.equal(e.x, first)]
    o, *mlp = linears[len(attention) :]
    if len(mlp) < 2:
        raise NotReadable("a block has no MLP of at least two linears")
    return _Linears(attention, o, mlp[:-1], mlp[-1])


def _head_norms(calls: BlockEvents, linears: _Linears) -> list[Event]:
    norms = [e for e in calls.events if is_norm(e.module)]
    return [e for e in norms if reads_heads(e, linears.attention)]


def _read_block(
    calls: BlockEvents,
    linears: _Linears,
    form: _Form,
    attention: AttentionPlan,
) -> BlockPlan:
    up = [linears.up[i] for i in form.order]
    of_heads = _head_norms(calls, linears)
    norms = [e for e in calls.events if is_norm(e.module) and e not in of_heads]
    found = _read_norms(norms, calls, linears)

    return BlockPlan(
        attention=attention,
        o=packed(linears.o),
        up=tuple(packed(e) for e in up),
        down=packed(linears.down),
        attention_norm=found.attention,
        mlp_norm=found.mlp,
        post_norms=found.posts,
        activation=form.activation,
        gated=form.gated,
        pre_norm=found.pre_norm,
    )


@dataclass(frozen=True)
class _Norms:
    """Of a block. posts: those of what attention and MLP give, before it is added."""

    pre_norm: bool
    attention: Norm | None
    mlp: Norm
    posts: tuple[Norm, ...] | None = None


def _read_norms(norms: list[Event], calls: BlockEvents, linears: _Linears) -> _Norms:
    """Who reads whom shows bit for bit; sums may have been rounded in another order."""
    branches = [linears.o.y, linears.down.y]
    posts = [e for e in norms if _is_one_of(e.x, branches)]
    around = [e for e in norms if e not in posts]
    plans = [norm_of(e) for e in around]
    if not posts and len(around) == 2 and _come_last(around, calls, linears):
        return _Norms(False, plans[0], plans[1])

    if posts:
        branches = [post.y for post in posts]
    if len(branches) == 2 and _come_first(around, calls, linears, branches):
        attention = plans[0] if len(plans) == 2 else None
        after = tuple(norm_of(e) for e in posts)
        return _Norms(
            pre_norm=True,
            attention=attention,
            mlp=plans[-1],
            posts=after or None,
        )
    raise NotReadable("its norms lie somewhere else than before or after attention and MLP")


def _is_one_of(x: Tensor, tensors: list[Tensor]) -> bool:
    return any(torch.equal(x, tensor) for tensor in tensors)


def _come_last(norms: list[Event], calls: BlockEvents, linears: _Linears) -> bool:
    """Whether both norms read a residual sum, and the second makes the block's output."""
    one, two = norms
    given = calls.given
    made = calls.made
    first_sum = given + linears.o.y
    second_sum = one.y + linears.down.y

    return (
        torch.equal(linears.attention[0].x, given)
        and torch.equal(linears.up[0].x, one.y)
        and torch.equal(two.y, made)
        and near(one.x, first_sum)
        and near(two.x, second_sum)
    )


def _come_first(
    norms: list[Event],
    calls: BlockEvents,
    linears: _Linears,
    branches: list[Tensor],
) -> bool:
    """Whether the norms make what attention and MLP read, that of attention if there is one.

    branches: what is added to the residual stream after attention and MLP.
    """
    if len(norms) not in (1, 2):
        return False

    *before, two = norms
    read = calls.given
    for one in before:
        if not torch.equal(one.x, calls.given):
            return False
        read = one.y

    first_sum = calls.given + branches[0]
    second_sum = two.x + branches[1]

    return (
        torch.equal(linears.attention[0].x, read)
        and torch.equal(linears.up[0].x, two.y)
        and near(two.x, first_sum)
        and near(calls.made, second_sum)
    )


def _mlp_form(blocks: list[_Linears]) -> _Form:
    """What the MLPs of all blocks compute.

    The nearest form is taken: some activations differ little, and on small numbers hardly at all,
    so all blocks have a say. Raises NotReadable.
    """
    errors = [_form_errors(block) for block in blocks]
    shared = [form for form in errors[0] if all(form in others for others in errors)]
    totals = {form: sum(own[form] for own in errors) for form in shared}
    best = min(totals, key=lambda form: totals[form], default=None)
    if best is None or max(own[best] for own in errors) > READING_ERROR:
        raise NotReadable("its MLP has another form than act(up), act(gate) · up with a known act")
    return best


def _form_errors(block: _Linears) -> dict[_Form, float]:
    """How far each form is from what the last linear was given."""
    outputs = [e.y.float() for e in block.up]
    wanted = block.down.x.float()

    errors = {}
    for name, act in ACTIVATIONS.items():
        for (gated, order), (gate, *value) in _inputs_of_forms(outputs).items():
            made = math.prod(value, start=act(gate))
            errors[_Form(name, gated, order)] = distance(made, wanted)

    return errors


def _inputs_of_forms(outputs: list[Tensor]) -> dict[_Choice, list[Tensor]]:
    """Choice → what an activation may read, and what it may be times."""
    found: dict[_Choice, list[Tensor]] = {}
    if len(outputs) == 1:
        found[False, (0,)] = outputs
        found[True, (0,)] = list(outputs[0].chunk(2, -1))

    if len(outputs) == 2:
        found[True, (0, 1)] = outputs
        found[True, (1, 0)] = outputs[::-1]

    return found
