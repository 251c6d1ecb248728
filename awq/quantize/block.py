"""`BlockQuantizer`: the steps that quantize one block, in the order in which `pipeline` calls
them."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from awq.core.scales import ScaleChoice
from awq.core.team import present_team
from awq.folds import InputGroup, apply_fold, discover, prove
from awq.nn.experts import every_token
from awq.nn.memory import release_cached
from awq.nn.surgery import device_of, get_weight
from awq.nn.walk import BlockVisit
from awq.quantize.experts import (
    RoundingPart,
    rounding_parts,
    statistics_name,
)
from awq.quantize.gather import gather, input_error, once_per_token
from awq.quantize.group import (
    QuantizedLinear,
    choose_scale,
    quantize_group,
    round_to_nearest_losses,
)
from awq.quantize.input_error import InputErrorStatistics, OriginalInputs
from awq.quantize.run import QuantizeRun
from awq.quantize.statistics import InputStatistics
from awq.quantize.streams import find_streams

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
        found = gather(self.block, self.groups, self.visit, self.run.batches)
        for owner, tokens in found.tokens_of_experts.items():
            self.run.report.experts[f"{self.visit.name}.{owner}"] = tokens

        for name, statistics in found.statistics.items():
            if statistics.dropped:
                self._warn(
                    f"{name}: {statistics.dropped} tokens with non-finite or outsized activations "
                    "were left out."
                )

        self.statistics = found.statistics

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
