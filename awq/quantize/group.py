"""Quantizing the linears that share one input: scale, then range, then rounding; never worse than
round-to-nearest.

The order matters: scales are folded first (the function stays the same), ranges are found for the
folded weights, and codes last. Each step is kept for a row only if its output error on the
calibration inputs is not above the step before.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from awq.config import AwqConfig
from awq.core.ranges import search_range
from awq.core.refinement import lean_of, refine
from awq.core.rounding import feedback_factor, round_with_feedback
from awq.core.scales import ScaleChoice, row_losses, search_scale
from awq.core.team import present_team
from awq.core.weight import (
    QuantizedWeight,
    group_range,
    quantize_nearest,
    round_to_nearest,
    scale_and_zero,
)
from awq.folds import InputGroup
from awq.nn.surgery import get_weight
from awq.quantize.input_error import InputErrorStatistics, corrected
from awq.quantize.options import QuantizeOptions
from awq.quantize.report import LinearReport
from awq.quantize.statistics import InputStatistics
from awq.quantize.tuned import packed_lean

_LEAST_ENERGY = 1e-30  # below the energy of any output that is not zero
# most weights rounded at once: 0.1 GB each time on a CPU, half a GB on a GPU
ROUNDED_VALUES = {"cpu": 1 << 25, "cuda": 1 << 27}
_WORTH_DIVIDING = 4  # a weight of more than this part of them is rounded by two processes


@dataclass
class QuantizedLinear:
    """A linear's canonical weight and its report line (name relative to the block).

    bias_change: float32 [out], or None. lean: int8 [out, in] (`awq.quantize.tuned`), where codes
    are tuned later.
    """

    name: str
    weight: QuantizedWeight
    report: LinearReport
    bias_change: Tensor | None = None
    lean: Tensor | None = None


def choose_scale(
    block: nn.Module,
    group: InputGroup,
    statistics: InputStatistics,
    config: AwqConfig,
    options: QuantizeOptions,
) -> ScaleChoice:
    """The group's best scale [in]; identity when it cannot be folded or was never active."""
    fold = group.fold
    if fold is None or not options.scaling or statistics.tokens == 0:
        one = torch.ones(group.in_features, dtype=torch.float32, device=statistics.gram.device)
        return ScaleChoice(one, 0.0, "identity", float("nan"), float("nan"))
    return search_scale(
        _stacked_weight(block, list(group.consumers)),
        _judging_gram(block, list(group.consumers), statistics, options),
        statistics.abs_mean,
        config.group_size_of(group.in_features, group.consumers[0]),
        config.bits,
        config.zero_point,
        options.duo_scaling,
        fold.tie,
    )


def round_to_nearest_losses(
    block: nn.Module,
    group: InputGroup,
    names: list[str],
    statistics: InputStatistics,
    config: AwqConfig,
) -> dict[str, float]:
    """Relative output error of plain round-to-nearest for each untouched linear of a group."""
    size = config.group_size_of(group.in_features, group.consumers[0])
    team = present_team()
    losses = {}

    for name in names:
        weight = get_weight(block.get_submodule(name)).detach().float()
        found = torch.zeros(2, len(weight), dtype=torch.float32, device=weight.device)
        for number, part in enumerate(_row_chunks(weight)):
            if team.has(number):
                rows = weight[part]
                nearest = round_to_nearest(rows, size, config.bits, config.zero_point)
                found[0, part] = row_losses(nearest.dequantize().sub_(rows), statistics.gram)
                found[1, part] = row_losses(rows, statistics.gram)

        team.total(found)
        loss, energy = found.sum(1)
        losses[name] = float(loss / energy.clamp(min=_LEAST_ENERGY))

    return losses


def quantize_group(
    block: nn.Module,
    group: InputGroup,
    statistics: InputStatistics,
    choice: ScaleChoice,
    names: list[str],
    config: AwqConfig,
    options: QuantizeOptions,
) -> list[QuantizedLinear]:
    """Quantizes the linears `names` of a group whose scales (and those of every other group) are
    folded already.

    They are worked on together, as rows of one weight, because they share the Gram matrix and its
    factorization. The statistics are those of the input *behind* the folded scale; with
    `InputErrorStatistics`, the rows aim at the original model's outputs, and the sums of the error
    are given up for that. `loss_rtn` is filled by the caller, who saw the untouched weights. Biases
    are changed by the caller, too.
    """
    start = time.perf_counter()
    size = config.group_size_of(group.in_features, group.consumers[0])
    gram = _judging_gram(block, names, statistics, options)
    stacked = _stacked_weight(block, names)
    with_bias = options.bias_correction and _have_bias(block, names)
    with_feedback = options.rounding == "feedback" and statistics.tokens > 0
    lack, mean_change = None, torch.zeros(len(stacked), dtype=torch.float32, device=gram.device)

    if isinstance(statistics, InputErrorStatistics) and with_feedback:
        lack, mean_change = statistics.lack(stacked, options.correction or 0.0, with_bias)
        statistics.forget_error()

    factor = feedback_factor(gram) if with_feedback else None

    def quantized(part: slice) -> tuple[Tensor, ...]:
        target = stacked[part]
        if lack is not None and factor is not None:
            target = corrected(target, lack[part], *factor)

        found = quantize_rows(target, gram, size, config, options, factor)
        weight = found.weight
        error = stacked[part] - weight.dequantize()
        shift = error @ statistics.mean
        energy = row_losses(stacked[part], statistics.gram)

        lean = []
        if options.tuning:
            wanted = lean_of(target, gram, weight)
            lean.append(packed_lean(wanted))

        return (
            weight.codes,
            weight.scales,
            weight.zeros,
            *found[1:],
            energy,
            shift,
            *lean,
        )

    found = present_team().rows(_row_chunks(stacked), quantized, stacked.device)
    rows, shift, leans = found[:7], found[7] + mean_change, found[8:]

    results = []
    lengths = [len(get_weight(block.get_submodule(name))) for name in names]
    for name, part in zip(names, _parts(lengths, *rows, shift)):
        codes, scales, zeros, loss, feedback, narrowed, energy, bias_change = part
        report = LinearReport(
            name=name,
            shape=(codes.shape[0], codes.shape[1]),
            kind=choice.kind,
            ratio=choice.ratio,
            loss=float(loss.sum() / energy.sum().clamp(min=_LEAST_ENERGY)),
            loss_rtn=float("nan"),
            clip_fraction=float(narrowed.mean()),
            rounding="feedback" if float(feedback.float().mean()) > 0.5 else "nearest",
            producer=group.fold.producer if group.fold else None,
            reason=group.reason,
            seconds=0.0,
        )
        weight = QuantizedWeight(codes, scales, zeros, config.bits)
        results.append(QuantizedLinear(name, weight, report, bias_change if with_bias else None))

    for lean in leans:  # there is none without tuning
        for result, own in zip(results, lean.split(lengths)):
            result.lean = own

    for result in results:
        result.report.seconds = (time.perf_counter() - start) / len(results)
    return results


def _stacked_weight(block: nn.Module, names: list[str]) -> Tensor:
    """Weights of linears that read one input, as rows of one: float32 [sum of out, in]; of a single
    linear, its own."""
    weights = [get_weight(block.get_submodule(name)).detach().float() for name in names]
    return weights[0].contiguous() if len(weights) == 1 else torch.cat(weights)


def rounded_rows(out: int, width: int, kind: str) -> int:
    """Rows of a weight [out, width] that are rounded at once: of a large one not all, for every
    step makes a tensor of their size. They make an even number of pieces, as equal as can be, for
    processes that divide them. kind: of the device."""
    values = ROUNDED_VALUES["cpu" if kind == "cpu" else "cuda"]
    pieces = -(-out * width // values)
    if out * width > values // _WORTH_DIVIDING:
        pieces += pieces % 2
    return -(-out // max(1, pieces))


def _row_chunks(weight: Tensor) -> list[slice]:
    """Rows of a weight [out, in] that are rounded at once."""
    rows = rounded_rows(weight.shape[0], weight.shape[1], weight.device.type)
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def _parts(lengths: list[int], *tensors: Tensor):
    """For each length, that many rows of every tensor."""
    return zip(*(tensor.split(lengths) for tensor in tensors))


def _have_bias(block: nn.Module, names: list[str]) -> bool:
    return all(getattr(block.get_submodule(name), "bias", None) is not None for name in names)


def _judging_gram(
    block: nn.Module,
    names: list[str],
    statistics: InputStatistics,
    options: QuantizeOptions,
) -> Tensor:
    """The Gram matrix that judges these linears: the centred one when all have a bias that takes
    the mean of the error."""
    centred = options.bias_correction and _have_bias(block, names)
    return statistics.centred_gram if centred else statistics.gram


class QuantizedRows(NamedTuple):
    """weight; and for each row: loss diag(Δ G Δᵀ), feedback (bool), narrowed (share of groups with
    a narrowed range)."""

    weight: QuantizedWeight
    loss: Tensor
    feedback: Tensor
    narrowed: Tensor


def quantize_rows(
    weight: Tensor,
    gram: Tensor,
    group_size: int,
    config: AwqConfig,
    options: QuantizeOptions,
    factor: tuple[Tensor, Tensor] | None,
) -> QuantizedRows:
    """Codes for a weight [out, in]: for each row the best of min/max nearest, searched range
    nearest, and error feedback.

    factor: of the Gram matrix, by `feedback_factor`; None: no feedback.
    """
    bits = config.bits
    full = scale_and_zero(
        *group_range(weight, group_size, config.zero_point), bits, config.zero_point
    )
    nearest = quantize_nearest(weight, *full, bits)
    nothing = torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
    best = QuantizedRows(
        nearest, row_losses(nearest.dequantize().sub_(weight), gram), nothing.bool(), nothing
    )
    ranges = full

    if options.clip:
        searched = search_range(weight, gram, group_size, bits, config.zero_point)
        narrowed = (searched[0] != full[0]).float().mean(1)
        best = _better_rows(
            best, quantize_nearest(weight, *searched, bits), weight, gram, False, narrowed
        )
        ranges = best.weight.scales.float(), best.weight.zeros.float()

    if factor is not None:
        codes = round_with_feedback(weight, *factor, *ranges, bits)
        codes = refine(weight, gram, codes, options.refinement or 0)
        best = _better_rows(best, codes, weight, gram, True, best.narrowed)

    return best


def _better_rows(
    old: QuantizedRows,
    new: QuantizedWeight,
    weight: Tensor,
    gram: Tensor,
    feedback: bool,
    narrowed: Tensor,
) -> QuantizedRows:
    """The rows of `new` where its loss is not above the old one's, the old rows elsewhere."""
    loss = row_losses(new.dequantize().sub_(weight), gram)
    better = loss <= old.loss
    codes, scales, zeros = (
        torch.where(better.unsqueeze(-1), a, b) for a, b in zip(new[:3], old.weight[:3])
    )

    return QuantizedRows(
        weight=QuantizedWeight(codes, scales, zeros, new.bits),
        loss=torch.where(better, loss, old.loss),
        feedback=torch.where(better, feedback, old.feedback),
        narrowed=torch.where(better, narrowed, old.narrowed),
    )
