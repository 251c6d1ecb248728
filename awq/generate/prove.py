"""From a transformers model to a `FusedDecoder`, proven block by block and then as a whole, or the
reason why not.

Reading a structure off values is guessing; this is what makes guesses safe. A fused block must give
what transformers' block gives, in float32 and to 1e-4 of its contribution: at the first positions
and at the last ones that the cache will hold, since tables and masks may change on the way; as a
prompt, and as a prompt followed by a step, since they take different code. Then the decoder on the
joined weights must give the model's own logits, to what the model's dtype can tell.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from awq.generate.plan import BlockPlan, DecoderPlan, NotFusable, Table, map_templates
from awq.generate.read.block import read_block
from awq.generate.read.model import PIECE, ModelFrame, read_model
from awq.generate.read.own import Templates, own_plans
from awq.generate.read.trace import rotary_tables, trace
from awq.generate.run.block import FusedBlock, Prompt, Step
from awq.generate.run.cache import LayerCache, MixerStates, allocate, new_states
from awq.generate.run.decoder import FusedDecoder
from awq.generate.run.head import quantized_head
from awq.generate.run.operations import summed
from awq.nn.block_calls import BlockCall
from awq.nn.blocks import float_copy
from awq.nn.copies import copy_structure
from awq.nn.locks import lock_of
from awq.nn.memory import trim
from awq.nn.surgery import device_of, get_weight

logger = logging.getLogger("awq.generate")

_TOLERANCE = 1e-4  # of a block's contribution, in float32
# of the logits' norm, in the model's own dtype; the second in 16 bits
_WHOLE, _WHOLE_ROUGH = 1e-2, 0.1


def build_decoder(
    model: Any,
    max_seq_len: int,
    batch_size: int = 1,
    merge: bool = True,
    quantize_head: bool = False,
) -> FusedDecoder:
    """The fused form of a language model, on the same weights. Raises NotFusable with the reason.

    max_seq_len: tokens of a row, prompt included, that the cache holds; fewer when the model itself
    knows fewer positions and cannot go beyond (the decoder's `max_seq_len` says how many). merge:
    siblings become one packed product each, and the model's own modules slices of it.
    quantize_head: decode through a 4-bit copy of the head.

    Other threads may run the model meanwhile: it is read and proven on a copy of its modules, and
    joined as `projection` says.
    """
    # Tensors made in inference mode could not be used by a training step later.
    with lock_of(model), torch.inference_mode(False), torch.no_grad():
        devices = {p.device for p in model.parameters()} | {b.device for b in model.buffers()}
        if len(devices) != 1 or next(iter(devices)).type == "meta":
            raise NotFusable(f"the model is spread over {', '.join(sorted(map(str, devices)))}")

        plan, expected = _read_and_compute(model, max_seq_len)
        decoder = FusedDecoder(plan, model, batch_size, merge)
        try:
            prove_whole(decoder, expected)
        except BaseException:
            decoder.restore()
            raise

        if quantize_head:
            decoder.body.head = quantized_head(plan.head)
        trim()

        return decoder


def _read_and_compute(model: Any, max_seq_len: int) -> tuple[DecoderPlan, Tensor]:
    """(the model's plan, proven block by block; the model's own logits of `probe_ids` [1, PIECE,
    vocabulary])."""
    try:
        plan = _read_and_prove(model, _twin(model), max_seq_len)
    except NotFusable as reason:
        known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(known, int) or not PIECE <= known < max_seq_len:
            raise

        plan = _read_and_prove(model, _twin(model), known)
        logger.info(
            "max_seq_len is %d, the positions that the model knows, instead of %d: %s",
            known,
            max_seq_len,
            reason,
        )

    ids = probe_ids(plan)
    twin = _twin(model)

    return plan, twin(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def _twin(model: Any) -> Any:
    """A copy of the model's modules that nothing has run through: rotary tables that grow with the
    longest sequence seen may never shrink again (transformers 5.0)."""
    try:
        return copy_structure(model)
    # someone else's attributes, which may refuse to be copied in any way
    except Exception as error:
        raise NotFusable(
            f"its modules cannot be copied: {type(error).__name__}: {error}"
        ) from error


def probe_ids(plan: DecoderPlan) -> Tensor:
    """Random tokens int64 [1, tokens] that nothing was read from."""
    weight = get_weight(plan.embedding)
    length = min(PIECE, plan.max_seq_len)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(min(3, len(weight) - 1), len(weight), (1, length), generator=generator)
    return ids.to(weight.device)


def prove_whole(decoder: FusedDecoder, expected: Tensor) -> None:
    """Logits of a prompt and of a step beside the model's own of `probe_ids`. Raises NotFusable.

    Blocks are proven more sharply one by one; this is for what surrounds them. A model whose own
    logits are not finite, as where float16 cannot hold its activations, has nothing to be compared
    with: a warning says so.
    """
    ids = probe_ids(decoder.plan)
    length = ids.shape[1]
    theirs = expected[0].float()
    if not bool(theirs[-2:].isfinite().all()):
        logger.warning(
            "the model's own logits are not finite in %s; its fused blocks are proven one by one "
            "only",
            decoder.dtype,
        )
        return
    if length == 1:
        return

    lengths = torch.full((1,), length - 1, dtype=torch.int32, device=ids.device)
    with torch.inference_mode():
        prompt = decoder.prefill(ids[:, :-1], [length - 1])
        step = decoder.eager_step(ids[:, -1], lengths, length - 1)

    tolerance = _WHOLE_ROUGH if decoder.dtype.itemsize < 4 else _WHOLE
    for logits, own, what in zip((prompt, step), theirs[-2:], ("a prompt", "a step")):
        error = float((logits[0] - own).norm() / own.norm().clamp(min=1e-30))
        if not error <= tolerance:
            raise NotFusable(
                f"the fused model's logits differ from transformers' by {error:.1e} after {what}"
            )

    decoder.cache = []


def _read_and_prove(model: Any, twin: Any, max_seq_len: int) -> DecoderPlan:
    """twin: a copy of the model's modules, to look at; the plan names modules of the model
    itself."""
    around = read_model(twin, max_seq_len)
    states = partial(new_states, model.config.get_text_config())
    templates = Templates()
    chosen = [
        proven_plan(around, index, templates, states, max_seq_len)
        for index in range(len(around.blocks))
    ]
    plans = [plan for plan, _ in chosen]
    keeps_states = any(kept for _, kept in chosen)
    blocks: Any = model.get_submodule(around.name)

    return DecoderPlan(
        plans,
        list(blocks),
        model.get_input_embeddings(),
        around.entrance.factor,
        around.entrance.positions,
        around.entrance.norm,
        around.entrance.counts_padding,
        around.norm,
        model.get_output_embeddings(),
        around.logits_factor,
        around.logits_softcap,
        max_seq_len,
        states if keeps_states else None,
    )


def proven_plan(
    around: ModelFrame,
    index: int,
    templates: Templates,
    states: Callable[[], MixerStates],
    max_seq_len: int,
) -> tuple[BlockPlan, bool]:
    """(the best plan of one block that is proven, whether it keeps states). Raises NotFusable with
    what is wrong with the best one."""
    block = around.blocks[index]
    calls = around.near[index], around.far[index]
    hidden = probe(around.width, device_of(block))

    first: NotFusable | None = None
    for plan in plans_of(around, index, templates):
        try:
            if isinstance(plan, NotFusable):
                raise plan

            if plan.attention is not None and index in around.windows:
                attention = replace(plan.attention, window=around.windows[index])
                plan = replace(plan, attention=attention)
            return plan, prove(plan, block, hidden, calls, max_seq_len, states)
        except NotFusable as reason:
            first = first or reason

    assert first is not None
    raise first


def plans_of(
    around: ModelFrame,
    index: int,
    templates: Templates,
) -> Iterator[BlockPlan | NotFusable]:
    """Plans of one block, the fastest first, or reasons why there is none."""
    block = float_copy(around.blocks[index])
    call = around.near[index].to(device_of(block), torch.float32)
    hidden = probe(around.width, device_of(block))
    real = trace(block, call, hidden)

    reason = "what was read of it is not what it does"
    try:
        yield _with_tables(
            read_block(trace(block, call, hidden, neutral=True), real, call), around, index, call
        )
    except NotFusable as error:
        yield error
        reason = str(error)

    if real.calls and index not in around.windows:
        return  # a module's own attention may see less than it says

    template = templates.of(around.near[index], around.everywhere[index], around.changed[index])
    try:
        yield from own_plans(real, call, template, reason)
    except NotFusable as error:
        yield error


def _with_tables(plan: BlockPlan, around: ModelFrame, index: int, call: BlockCall) -> BlockPlan:
    """The plan with rotary tables of all positions."""
    if plan.cos is None:
        return plan
    cos, sin = _whole_tables(plan.cos, call, around.tables[index])
    return replace(plan, cos=cos, sin=sin)


def _whole_tables(
    cos: Tensor,
    call: BlockCall,
    tables: dict[str, tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """(cos, sin) over all positions, of the columns that were recognized in the table of the first
    ones."""
    columns = cos.shape[-1]
    for name, (short, _) in rotary_tables(call).items():
        places, width = short.shape[-2:]
        first_piece = short.reshape(-1, places, width)[:1].float()
        for chosen in (slice(0, columns), slice(0, None, width // columns)):
            recognized = first_piece[..., chosen]
            if torch.equal(recognized, cos[:1]):
                whole_cos, whole_sin = (whole[:, chosen] for whole in tables[name])
                return whole_cos.contiguous(), whole_sin.contiguous()
    raise NotFusable("the rotary table of the block cannot be followed beyond the first positions")


def probe(width: int, device: torch.device) -> Tensor:
    """Random hidden states float32 [2, PIECE, width] for a block."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, PIECE, width, generator=generator, dtype=torch.float32).to(device)


def prove(
    plan: BlockPlan,
    block: nn.Module,
    hidden: Tensor,
    calls: tuple[BlockCall, BlockCall],
    max_seq_len: int,
    states: Callable[[], MixerStates],
) -> bool:
    """The fused block gives what transformers' block gives, in float32, at the first positions and
    at the last.

    As a prompt, and as a prompt followed by a step through the cache. calls: how the block is
    called at either end. Returns whether the block keeps states. Raises NotFusable.
    """
    copy = float_copy(block)
    last = max(0, -(-max_seq_len // PIECE) * PIECE - PIECE)

    keeps_states = False
    for call, start in zip(calls, (0, last)):
        expected = call.to(device_of(copy), torch.float32).run(copy, hidden) - hidden
        fused = FusedBlock(_moved(plan, start, max_seq_len), copy)
        whole = _contribution(fused, hidden, _room(plan, hidden, states), Prompt(0))
        cache = _room(plan, hidden, states)
        lengths = torch.full((2,), PIECE - 1, dtype=torch.int32, device=hidden.device)
        _contribution(fused, hidden[:, :-1], cache, Prompt(0))
        step = _contribution(fused, hidden[:, -1:], cache, Step(lengths, PIECE - 1))
        keeps_states |= cache.states is not None and not cache.states.empty

        for ours, theirs, what in (
            (whole, expected, "a prompt"),
            (step, expected[:, -1:], "one token"),
        ):
            error = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
            if not error <= _TOLERANCE:
                raise NotFusable(
                    f"the fused block differs from transformers' by {error:.1e} on {what} at "
                    f"position {start}"
                )

    return keeps_states


def _room(plan: BlockPlan, hidden: Tensor, states: Callable[[], MixerStates]) -> LayerCache:
    """An empty cache for the rows of a proof."""
    cache = allocate([plan.attention], len(hidden), PIECE, torch.float32, hidden.device)[0]
    takes_states = plan.own is not None and plan.own.cache is not None
    return replace(cache, states=states()) if takes_states else cache


def _moved(plan: BlockPlan, start: int, max_seq_len: int) -> BlockPlan:
    """The plan with the rotary tables of PIECE places from `start` on, so that a cache of a few
    places will do."""
    if plan.own is not None:
        call = map_templates(plan.own.call, partial(_moved_table, start, max_seq_len))
        return replace(plan, own=replace(plan.own, call=call))
    if plan.cos is None or plan.sin is None:
        return plan

    places = _places(start, max_seq_len, plan.cos.device)
    return replace(plan, cos=plan.cos[places], sin=plan.sin[places])


def _moved_table(start: int, max_seq_len: int, table: Table) -> Table:
    values = table.values[_places(start, max_seq_len, table.values.device)]
    return replace(table, values=values.float() if values.is_floating_point() else values)


def _places(start: int, max_seq_len: int, device: torch.device) -> Tensor:
    return torch.arange(start, start + PIECE, device=device) % max(max_seq_len, PIECE)


def _contribution(
    fused: FusedBlock,
    hidden: Tensor,
    cache: LayerCache,
    where: Prompt | Step,
) -> Tensor:
    try:
        x, branch = fused(hidden, None, cache, where)
    except NotFusable:
        raise
    except Exception as error:  # of the model's own code, called as it has never been
        raise NotFusable(
            f"a part of the block cannot be run alone: {type(error).__name__}: {error}"
        ) from error

    if branch is None:
        return x - hidden

    whole = branch if branch.dim() == x.dim() else summed(branch)
    return x + fused.plan.factor * whole - hidden
