"""Quantizing the linears that share one input: scale, then range, then rounding; never worse than round-to-nearest.

The order matters: scales are folded first (the function stays the same), ranges are found for the folded weights, and codes
last. Each step is kept for a linear only if its output error on the calibration inputs is not above the step before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from awq.config import AwqConfig
from awq.core.ranges import search_range
from awq.core.rounding import feedback_factor, round_with_feedback
from awq.core.scales import ScaleChoice, gram_loss, search_scale
from awq.core.weight import QuantizedWeight, group_range, quantize_nearest, round_to_nearest, scale_and_zero
from awq.folds import InputGroup
from awq.nn.surgery import get_weight
from awq.quantize.options import QuantizeOptions
from awq.quantize.report import LinearReport
from awq.quantize.statistics import InputStatistics


@dataclass
class QuantizedLinear:
    """A linear's canonical weight and its report line (name relative to the block)."""

    name: str
    weight: QuantizedWeight
    report: LinearReport


def choose_scale(
    block: nn.Module,
    group: InputGroup,
    statistics: InputStatistics,
    config: AwqConfig,
    options: QuantizeOptions,
    module_loss: Callable[[Tensor], float] | None = None,
) -> ScaleChoice:
    """The group's scale by the options' objective; identity when it cannot be folded or was never active."""
    fold = group.fold
    if fold is None or not options.scaling or statistics.tokens == 0:
        one = torch.ones(group.in_features, device=statistics.gram.device)
        return ScaleChoice(one, 0.0, "identity", float("nan"), float("nan"))
    weight = torch.cat([get_weight(block.get_submodule(n)).detach().float() for n in group.consumers])
    return search_scale(
        weight, statistics.gram, statistics.abs_mean, config.group_size_of(group.in_features, group.consumers[0]),
        config.bits, config.zero_point, options.duo_scaling, fold.tie, module_loss,
    )  # fmt: skip


def relative_rtn_loss(weight: Tensor, gram: Tensor, group_size: int, config: AwqConfig) -> float:
    """Round-to-nearest's output error over the output's energy, for an untouched weight [out, in]."""
    rtn = round_to_nearest(weight, group_size, config.bits, config.zero_point).dequantize()
    return gram_loss(rtn.sub_(weight), gram) / _energy(weight, gram)


def quantize_group(
    block: nn.Module,
    group: InputGroup,
    statistics: InputStatistics,
    choice: ScaleChoice,
    names: list[str],
    config: AwqConfig,
    options: QuantizeOptions,
) -> list[QuantizedLinear]:
    """Quantizes the linears `names` of a group whose scales (and those of every other group) are folded already.

    The statistics are those of the *unscaled* input; the Gram matrix is divided by s sᵀ here. `loss_rtn` is filled by the
    caller, who saw the untouched weights.
    """
    size = config.group_size_of(group.in_features, group.consumers[0])
    gram = statistics.gram / choice.scale / choice.scale.unsqueeze(-1)
    feedback = options.rounding == "feedback" and statistics.tokens > 0
    factor = feedback_factor(gram, options.damping) if feedback else None
    results = []
    for name in names:
        start = time.perf_counter()
        weight = get_weight(block.get_submodule(name)).detach().float()
        quantized, rounding, clipped, loss = quantize_linear(weight, gram, factor, size, config, options)
        report = LinearReport(
            name, (weight.shape[0], weight.shape[1]), choice.kind, choice.ratio, loss / _energy(weight, gram), float("nan"),
            clipped, rounding, group.fold.producer if group.fold else None, group.reason, time.perf_counter() - start,
        )  # fmt: skip
        results.append(QuantizedLinear(name, quantized, report))
    return results


def _energy(weight: Tensor, gram: Tensor) -> float:
    return max(gram_loss(weight, gram), 1e-30)


def quantize_linear(
    weight: Tensor,
    gram: Tensor,
    factor: tuple[Tensor, Tensor] | None,
    group_size: int,
    config: AwqConfig,
    options: QuantizeOptions,
) -> tuple[QuantizedWeight, str, float, float]:
    """Codes for one weight [out, in]: the best of min/max nearest, searched range nearest, searched range with feedback.

    Returns the weight, the rounding used, the share of groups with a narrowed range, and tr(Δ G Δᵀ).
    """
    bits = config.bits
    full = scale_and_zero(*group_range(weight, group_size, config.zero_point), bits, config.zero_point)

    def attempt(quantized: QuantizedWeight, rounding: str, clipped: float):
        return quantized, rounding, clipped, gram_loss(quantized.dequantize().sub_(weight), gram)

    best = attempt(quantize_nearest(weight, *full, bits), "nearest", 0.0)
    ranges = full
    if options.clip:
        searched = search_range(weight, gram, group_size, bits, config.zero_point)
        clipped = float((searched[0] != full[0]).float().mean())
        candidate = attempt(quantize_nearest(weight, *searched, bits), "nearest", clipped)
        if candidate[3] <= best[3]:
            best, ranges = candidate, searched
    if factor is not None:
        candidate = attempt(round_with_feedback(weight, *factor, *ranges, bits), "feedback", best[2])
        if candidate[3] <= best[3]:
            best = candidate
    return best
