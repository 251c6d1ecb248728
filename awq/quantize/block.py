"""`BlockQuantizer`: the steps that quantize one block, in the order in which `pipeline` calls
them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from awq.core.scales import ScaleChoice
from awq.core.team import Named, Team, present_team
from awq.errors import ModelError
from awq.folds import InputGroup, apply_fold, discover, prove
from awq.nn.experts import every_token, expert_of, named_experts
from awq.nn.hooks import inputs_of
from awq.nn.memory import release_cached
from awq.nn.sorted_products import SortedProducts
from awq.nn.surgery import device_of, get_weight, linear_shape
from awq.nn.walk import BlockVisit
from awq.quantize.experts import (
    RoundingPart,
    collect_experts,
    complete_experts,
    rounding_parts,
    statistics_name,
)
from awq.quantize.group import (
    QuantizedLinear,
    choose_scale,
    quantize_group,
    round_to_nearest_losses,
)
from awq.quantize.input_error import InputErrorStatistics, OriginalInputs
from awq.quantize.run import QuantizeRun
from awq.quantize.statistics import (
    InputStatistics,
    MaskHolder,
    collect_inputs,
    fitting_mask,
    noted_inputs,
)
from awq.quantize.streams import find_streams, stream_error

logger = logging.getLogger("awq.quantize")


class BlockQuantizer:
    """One block in float32, and what is known about it so far.

    groups: linears that share an input, those with something to quantize. parts: what of them is
    rounded together.
    statistics: by `RoundingPart.statistics`, in order of first calls. choices: the scale that was
    folded for each group.
    """

    def __init__(self, run: QuantizeRun, visit: BlockVisit) -> None:
        self.run, self.visit = run, visit
        self.block: nn.Module = visit.block
        self.targets = {
            name.removeprefix(f"{visit.name}.")
            for name in run.plan.targets
            if name.startswith(f"{visit.name}.")
        }
        self.groups: list[InputGroup] = []
        self.parts: list[RoundingPart] = []
        self.statistics: dict[str, InputStatistics] = {}
        self.choices: list[ScaleChoice] = []
        self.original: OriginalInputs | None = None
        self.losses_rtn: dict[str, float] = {}
        self.results: list[QuantizedLinear] = []

    # 1. Which scales can move where

    def find_folds(self) -> None:
        """Input groups with proven folds: discovered once per structure of blocks, proven on every
        block."""
        with every_token(self.block):
            groups = [self._within_one_block(group) for group in self._proven_groups()]
        self.groups = [group for group in groups if self.targets.intersection(group.consumers)]
        self.parts = rounding_parts(self.block, self.groups, self.targets)

    def _proven_groups(self) -> list[InputGroup]:
        generator = torch.Generator().manual_seed(self.run.options.seed)
        structure = tuple((name, tuple(p.shape)) for name, p in self.block.named_parameters())
        known = self.run.known_folds.get(structure)
        if known is not None:
            proven = prove(self.block, known, self.visit.many, generator)
            if _folds_in(proven) == _folds_in(known):
                return proven

        guesses = discover(self.block, self.visit.single, self.visit.many, generator)
        groups = prove(self.block, guesses, self.visit.many, generator)
        self.run.known_folds[structure] = groups

        for group in groups:
            if group.fold is None:
                logger.debug(
                    "%s: %s keeps scale 1: %s",
                    self.visit.name,
                    ", ".join(group.consumers),
                    group.reason,
                )

        return groups

    def _within_one_block(self, group: InputGroup) -> InputGroup:
        """Without a fold that touches weights which other blocks use, too: those have neighbours of
        their own."""
        fold = group.fold
        if fold is None:
            return group

        names = {f"{self.visit.name}.{name}" for name in (fold.producer, *fold.consumers)}
        if not names & self.run.shared:
            return group
        return replace(group, fold=None, reason="other blocks share its weights")

    # 2. What the linears read

    def gather_statistics(self) -> None:
        """The Gram matrix of each distinct linear input, in one forward over the calibration
        tokens."""
        everything = {name for group in self.groups for name in group.consumers}
        readers = [part.statistics for part in rounding_parts(self.block, self.groups, everything)]
        routed = [name for name in readers if expert_of(self.block, name)]
        shared = [name for name in readers if name not in routed]
        layers = list(named_experts(self.block))
        routed_tokens: dict[str, list[Tensor]] = {name: [] for name in layers}
        team = present_team()
        sorted_rows = any(isinstance(module, SortedProducts) for module in self.block.modules())

        if team.size > 1 and not routed and not sorted_rows:
            statistics = self._divided_statistics(shared, team)
        else:
            statistics = self._own_statistics(shared, routed, routed_tokens)

        for found in statistics.values():
            found.complete()

        for group in self.groups:
            if not expert_of(self.block, group.consumers[0]):
                statistics.setdefault(
                    group.consumers[0], InputStatistics(group.in_features, self.visit.device)
                )

        for owner, tokens in complete_experts(
            self.block, statistics, routed, routed_tokens
        ).items():
            self.run.report.experts[f"{self.visit.name}.{owner}"] = tokens

        found_any = any(found.tokens for found in statistics.values())
        if not found_any and any(found.dropped for found in statistics.values()):
            raise ModelError(
                f"{self.visit.name}: no calibration token has finite activations; use another "
                "dtype or other texts."
            )

        for name, found in statistics.items():
            if found.dropped:
                self._warn(
                    f"{name}: {found.dropped} tokens with non-finite or outsized activations were "
                    "left out."
                )
            found.shrink_to_diagonal()

        self.statistics = statistics

    def _own_statistics(
        self,
        shared: list[str],
        routed: list[str],
        routed_tokens: dict[str, list[Tensor]],
    ) -> dict[str, InputStatistics]:
        """Of the linears `shared` and `routed`, summed while the block runs."""
        holder = MaskHolder()
        with (
            collect_inputs(self.block, shared, holder) as statistics,
            collect_experts(self.block, routed, holder, statistics, routed_tokens),
        ):
            for number in self._batches(holder):
                call, hidden = self.visit.call(number)
                call.run(self.block, hidden)
        return statistics

    def _divided_statistics(self, names: list[str], team: Team) -> dict[str, InputStatistics]:
        """Of linears outside of experts: each process runs the block on some of the batches, and
        sums some panels of the Gram matrices."""

        def inputs(number: int) -> Named:
            call, hidden = self.visit.call(number)
            with noted_inputs(self.block, names) as noted:
                call.run(self.block, hidden)
            return noted

        holder = MaskHolder()
        statistics: dict[str, InputStatistics] = {}
        made = team.each(len(self.run.batches), inputs, self.visit.device)
        for _, found in zip(self._batches(holder), made):
            for name, x in found:
                if name not in statistics:
                    statistics[name] = InputStatistics(x.shape[-1], x.device, team)
                statistics[name].add(x, holder.of(x), holder.weight)

        return statistics

    def _batches(self, holder: MaskHolder) -> Iterator[int]:
        """The numbers of the calibration batches, with their masks in `holder`."""
        masks = zip(self.run.batches, self.visit.masks(), self.visit.encoder_masks())
        for number, (batch, holder.mask, holder.encoder) in enumerate(masks):
            holder.weight = batch.weight
            yield number

    # 3. Activation-aware scales

    def fold_scales(self) -> None:
        """Chooses every group's scale for the block as it is, then folds them all: the function
        stays the same."""
        run = self.run
        for group in self.groups:
            statistics = self.statistics[statistics_name(self.block, group)]
            choice = choose_scale(self.block, group, statistics, run.config, run.options)
            if _no_finite_loss(choice) and group.fold is not None and run.options.scaling:
                self._warn(f"{', '.join(group.consumers)}: no finite loss; scale 1 is kept.")
            self.choices.append(choice)

        for part in self.parts:
            statistics = self.statistics[part.statistics]
            self.losses_rtn |= round_to_nearest_losses(
                self.block, part.group, part.names, statistics, run.config
            )

        for group, choice in zip(self.groups, self.choices):
            if group.fold is not None and choice.kind != "identity":
                apply_fold(self.block, group.fold, choice.scale)

    # 4. Ranges and codes

    def note_original_inputs(self) -> None:
        """Keeps what the block's linears read in the original model; the block is folded and not
        yet quantized."""
        if not self.run.corrects_inputs:
            return

        assert self.visit.calibration is not None
        if self.visit.index == 0:
            self.run.original_hidden = self.run.kept_hidden(self.visit.calibration.hidden)
        assert self.run.original_hidden is not None
        readers = [part.statistics for part in self.parts]
        names = [name for name in readers if once_per_token(self.statistics[name], self.visit)]
        calls = [calls[self.visit.index] for calls in self.visit.calibration.calls]
        alone = [
            part.statistics
            for part in self.parts
            if part.names == [part.statistics] and part.statistics in names
        ]
        streams = find_streams(self.block, alone, *self.visit.many[0])
        if device_of(self.run.model) != self.visit.device:
            release_cached(self.visit.device)

        self.original = OriginalInputs(
            self.block,
            names,
            calls,
            self.run.original_hidden,
            self.run.judges,
            streams,
        )

    def round_weights(self) -> None:
        """Quantizes the parts in the order of their first calls: a linear's input changes with
        those before it."""
        order = list(self.statistics)
        for part in sorted(self.parts, key=lambda part: order.index(part.statistics)):
            self._round_part(part)

    def _round_part(self, part: RoundingPart) -> None:
        choice = self.choices[part.source]
        statistics = self._behind_scale(part.statistics, choice.scale)
        with self.run.phase("rounding"):
            config, options = self.run.config, self.run.options
            results = quantize_group(
                self.block, part.group, statistics, choice, part.names, config, options
            )
            for result in results:
                self._write(result)

        self.results += results

    def _behind_scale(self, name: str, scale: Tensor) -> InputStatistics:
        """Statistics of a linear's input as it is now. Those from before, gigabytes in a wide
        block, are given up."""
        own = self.statistics.pop(name)
        if self.original is None or name not in self.original.names:
            own.divide_by(scale)
            return own

        del own
        with self.run.phase("input error"):
            found = self._input_error(name, self.original)
        assert found is not None  # the original's input is known

        return found

    def _input_error(self, name: str, original: OriginalInputs) -> InputErrorStatistics | None:
        weights = [batch.weight for batch in self.run.batches]
        return input_error(self.block, name, original, self.visit, self.run.judges, weights)

    def _write(self, result: QuantizedLinear) -> None:
        """The quantized values go into the ordinary linear, whose output the next groups read."""
        linear: Any = self.block.get_submodule(result.name)
        get_weight(linear).copy_(result.weight.dequantize())
        if result.bias_change is not None:
            linear.bias.add_(result.bias_change)

    # 5. On to the next block

    def advance(self) -> None:
        """The next block gets the *quantized* block's outputs, so that its error feedback corrects
        what this one did."""
        original = self.original
        if original is not None:
            assert self.run.original_hidden is not None
            count, device = len(original.calls), self.visit.device
            made = present_team().each(count, lambda batch: [("", original.output(batch))], device)
            for number, ((_, output),) in enumerate(made):
                self.run.original_hidden[number] = output

        self.visit.advance()

    def pack(self) -> None:
        """Puts packed linears into the block, and their lines into the report."""
        for result in self.results:
            full_name = f"{self.visit.name}.{result.name}"
            dtype = self.visit.dtypes[f"{result.name}.weight"]
            self.run.install(self.block, result.name, full_name, result.weight, dtype)

            if self.run.options.tuning:
                self.run.weights[full_name] = result.weight
                if result.lean is not None:
                    self.run.leans[full_name] = result.lean

            result.report.loss_rtn = self.losses_rtn[result.name]
            result.report.name = full_name
            self.run.report.linears.append(result.report)

    def _warn(self, text: str) -> None:
        self.run.report.warnings.append(f"{self.visit.name}, {text}")


def _folds_in(groups: list[InputGroup]) -> int:
    return sum(group.fold is not None for group in groups)


def _no_finite_loss(choice: ScaleChoice) -> bool:
    return choice.kind == "identity" and choice.loss != choice.loss


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

    def pair(index: int) -> Named:
        if index in unused:
            return []

        call, hidden = visit.call(index)
        now = inputs_of(block, names, partial(call.run, block, hidden))
        before = original.of(names, index)
        both = [("now", now[name]), ("before", before[name])]
        if stream is None:
            return both

        lack = stream_error(now[stream.reader], before[stream.reader], stream.factor)
        return [*both, ("missing", lack)]

    pairs = team.each(len(original.calls), pair, visit.device)
    for index, (tensors, *masks) in enumerate(zip(pairs, visit.masks(), visit.encoder_masks())):
        if index in unused:
            continue

        inputs = dict(tensors)
        mask = fitting_mask(inputs["now"], *masks)
        weight = 1.0 if weights is None else weights[index]
        found.add_pair(inputs["now"], inputs["before"], mask, inputs.get("missing"), weight)

    found.complete()

    found.shrink_to_diagonal()
    return found
