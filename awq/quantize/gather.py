"""What the linears of a block read over all calibration tokens, as statistics.

`gather` sums the inputs of a block as it is. `input_error` sums one linear's input beside what the
linear reads in the original model. Both run the block batch by batch; where several processes work
together, each runs some of the batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from awq.calibration import CalibrationBatch
from awq.core.team import Named, Team, present_team
from awq.errors import ModelError
from awq.folds import InputGroup
from awq.nn.experts import expert_of, named_experts
from awq.nn.hooks import inputs_of
from awq.nn.sorted_products import SortedProducts
from awq.nn.surgery import linear_shape
from awq.nn.walk import BlockVisit
from awq.quantize.experts import ExpertTokens, collect_experts, complete_experts, rounding_parts
from awq.quantize.input_error import (
    InputErrorStatistics,
    OriginalInputs,
    PreparedPair,
    prepared_pair,
)
from awq.quantize.statistics import (
    InputStatistics,
    MaskHolder,
    Prepared,
    collect_inputs,
    fitting_mask,
    prepared_inputs,
)
from awq.quantize.streams import stream_error


@dataclass
class Gathered:
    """statistics: by `RoundingPart.statistics`, in order of first calls. tokens_of_experts: by
    layer of experts."""

    statistics: dict[str, InputStatistics]
    tokens_of_experts: dict[str, ExpertTokens]


def gather(
    block: nn.Module,
    groups: Sequence[InputGroup],
    visit: BlockVisit,
    batches: Sequence[CalibrationBatch],
) -> Gathered:
    """The Gram matrix of each distinct input of the linears in `groups`.

    Raises ModelError when no token has finite activations.
    """
    everything = {name for group in groups for name in group.consumers}
    readers = [part.statistics for part in rounding_parts(block, groups, everything)]
    routed = [name for name in readers if expert_of(block, name)]
    shared = [name for name in readers if name not in routed]
    layers = list(named_experts(block))
    routed_tokens: dict[str, list[Tensor]] = {name: [] for name in layers}
    team = present_team()
    sorted_rows = any(isinstance(module, SortedProducts) for module in block.modules())

    if team.size > 1 and not routed and not sorted_rows:
        statistics = _divided(block, shared, visit, batches, team)
    else:
        statistics = _own(block, shared, routed, routed_tokens, visit, batches)

    for found in statistics.values():
        found.complete()

    for group in groups:
        reader = group.consumers[0]
        if reader not in statistics and not expert_of(block, reader):
            statistics[reader] = InputStatistics(group.in_features, visit.device)

    tokens = complete_experts(block, statistics, routed, routed_tokens)
    found_any = any(found.tokens for found in statistics.values())
    if not found_any and any(found.dropped for found in statistics.values()):
        raise ModelError(
            f"{visit.name}: no calibration token has finite activations; use another "
            "dtype or other texts."
        )

    for found in statistics.values():
        found.shrink_to_diagonal()

    return Gathered(statistics, tokens)


def _own(
    block: nn.Module,
    shared: list[str],
    routed: list[str],
    routed_tokens: dict[str, list[Tensor]],
    visit: BlockVisit,
    batches: Sequence[CalibrationBatch],
) -> dict[str, InputStatistics]:
    """Of the linears `shared` and `routed`, summed while the block runs."""
    holder = MaskHolder()
    with (
        collect_inputs(block, shared, holder) as statistics,
        collect_experts(block, routed, holder, statistics, routed_tokens),
    ):
        for number in _numbers(visit, batches, holder):
            call, hidden = visit.call(number)
            call.run(block, hidden)
    return statistics


def _divided(
    block: nn.Module,
    names: list[str],
    visit: BlockVisit,
    batches: Sequence[CalibrationBatch],
    team: Team,
) -> dict[str, InputStatistics]:
    """Of linears outside of experts: each process runs the block on some of the batches, prepares
    what these add, and sums some panels of the Gram matrices."""

    masks, encoder_masks = visit.masks(), visit.encoder_masks()

    def inputs(number: int) -> Named:
        call, hidden = visit.call(number)
        mask_of = partial(fitting_mask, mask=masks[number], encoder=encoder_masks[number])
        with prepared_inputs(block, names, mask_of) as made:
            call.run(block, hidden)
        return [(name, tensor) for name, batch in made for tensor in batch]

    statistics: dict[str, InputStatistics] = {}
    made = team.each(len(batches), inputs, visit.device)
    size = len(Prepared._fields)
    for batch, found in zip(batches, made):
        for start in range(0, len(found), size):
            name = found[start][0]
            part = Prepared(*(tensor for _, tensor in found[start : start + size]))
            if name not in statistics:
                statistics[name] = InputStatistics(part.rows.shape[-1], visit.device, team)
            statistics[name].take(part, batch.weight)

    return statistics


def _numbers(
    visit: BlockVisit,
    batches: Sequence[CalibrationBatch],
    holder: MaskHolder,
) -> Iterator[int]:
    """The numbers of the calibration batches, with their masks in `holder`."""
    masks = zip(batches, visit.masks(), visit.encoder_masks())
    for number, (batch, holder.mask, holder.encoder) in enumerate(masks):
        holder.weight = batch.weight
        yield number


def once_per_token(statistics: InputStatistics, visit: BlockVisit) -> bool:
    """Whether an input comes once for every token: an expert's cannot be compared between two
    models."""
    assert visit.calibration is not None
    inputs = visit.calibration
    own = sum(
        shape[0] * shape[1] if mask is None else int(mask.sum())
        for shape, mask in zip(inputs.hidden.shapes, inputs.masks)
    )
    encoder = sum(0 if mask is None else int(mask.sum()) for mask in inputs.encoder_masks)
    seen = statistics.tokens + statistics.dropped

    return (
        statistics.calls == len(inputs.hidden) and statistics.tokens > 0 and seen in (own, encoder)
    )


def input_error(
    block: nn.Module,
    name: str,
    original: OriginalInputs,
    visit: BlockVisit,
    unused: frozenset[int] = frozenset(),
    weights: Sequence[float] | None = None,
) -> InputErrorStatistics | None:
    """Statistics of the input of the linear `name` now and in the original block; None when they
    cannot be compared.

    unused: batches that are left out. weights: of the tokens of each batch; None: 1.
    """
    if name not in original.names:
        return None

    stream = original.streams.get(name)
    width, out = linear_shape(block.get_submodule(name))
    team = present_team()
    found = InputErrorStatistics(width, visit.device, 0 if stream is None else out, team)
    names = [name] if stream is None else [name, stream.reader]
    masks, encoder_masks = visit.masks(), visit.encoder_masks()

    def pair(index: int) -> Named:
        if index in unused:
            return []

        call, hidden = visit.call(index)
        now = inputs_of(block, names, partial(call.run, block, hidden))
        before = original.of(names, index)
        lack = None
        if stream is not None:
            lack = stream_error(now[stream.reader], before[stream.reader], stream.factor)

        mask = fitting_mask(now[name], masks[index], encoder_masks[index])
        return [("", part) for part in prepared_pair(now[name], before[name], mask, lack)]

    for index, made in enumerate(team.each(len(original.calls), pair, visit.device)):
        if index not in unused:
            weight = 1.0 if weights is None else weights[index]
            found.take_pair(PreparedPair(*(tensor for _, tensor in made)), weight)

    found.complete()

    found.shrink_to_diagonal()
    return found
