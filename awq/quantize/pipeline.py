"""The block-by-block pipeline: only one block's activations and statistics are in memory at a time.

For every block: prove its folds on a few tokens, gather the Gram matrix of each distinct linear input in one forward over the
calibration tokens, choose and fold scales, quantize, and hand the block's outputs to the next one. By default those outputs
are the *quantized* block's, so that error feedback corrects what its predecessors did (measured: docs/notes/quality.md).

Blocks are worked on in float32 whatever the model's dtype: folding in 16 bits would cost accuracy before quantization has
begun, and float16 products on a CPU are a hundred times slower.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from awq.calibration import CalibrationBatch
from awq.calibration.batches import BATCH_TOKENS, rebatched
from awq.checkpoint.expert_names import expert_names
from awq.config import AwqConfig
from awq.core.weight import QuantizedWeight
from awq.errors import CalibrationError
from awq.folds import InputGroup, apply_fold, discover, prove
from awq.nn.blocks import find_block_lists
from awq.nn.experts import conceal_experts, every_token, expert_of, expose_experts, named_experts
from awq.nn.linear import WQLinear
from awq.nn.packed_experts import pack_experts
from awq.nn.reading import watched_weights
from awq.nn.surgery import get_weight, linear_shape, replace_module
from awq.quantize.drift import DriftStatistics, OriginalInputs, input_of
from awq.quantize.experts import (
    collect_experts,
    complete_experts,
    rounding_parts,
    skip_in_mixtures,
    statistics_name,
)
from awq.quantize.group import QuantizedLinear, choose_scale, quantize_group, round_to_nearest_losses
from awq.quantize.module_loss import enclosing_module, module_loss, record_module_calls
from awq.quantize.options import QuantizeOptions
from awq.quantize.plan import Plan, make_plan
from awq.quantize.report import QuantReport
from awq.quantize.statistics import ENOUGH, InputStatistics, MaskHolder, collect_inputs
from awq.quantize.streams import Stream, open_streams
from awq.quantize.tuning import OutputMatch, held_out, micro_batches, tune_scales

logger = logging.getLogger("awq.quantize")

_GPU_BATCH_VALUES = 2**25  # of the widest input in one forward on a GPU, 128 MiB: narrow blocks would wait for the host with less


@dataclass
class Workbench:
    """What the steps of one run share."""

    config: AwqConfig
    options: QuantizeOptions
    plan: Plan
    report: QuantReport
    known: dict[Any, list[InputGroup]] = field(default_factory=dict)  # structure of a block → its folds
    weights: dict[str, QuantizedWeight] = field(default_factory=dict)  # full name → weight, kept when scales are tuned later

    @contextmanager
    def phase(self, name: str):
        start = time.perf_counter()
        yield
        self.report.phases[name] = self.report.phases.get(name, 0.0) + time.perf_counter() - start


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    batches: Sequence[CalibrationBatch],
    config: AwqConfig | None = None,
    options: QuantizeOptions | None = None,
) -> QuantReport:
    """Quantizes every linear in the model's repeated blocks, in place.

    model: a transformers model on one device. batches: token ids and masks [batch, tokens]; padding never enters a
    statistic. Linears become `WQLinear`, or stay dense with quantized values when `options.export_compatible`.
    Raises ConfigError, CalibrationError or ModelError before any weight is touched.
    """
    config, options = config or AwqConfig(), options or QuantizeOptions()
    if not batches or not any(int(b.attention_mask.sum()) for b in batches):
        raise CalibrationError("the calibration data holds no token; give at least one text.")
    start = time.perf_counter()
    model.eval()
    left = expose_experts(model, expert_names(model))
    try:
        report = _quantize(model, batches, config, options)
    finally:
        pack_experts(model)
        conceal_experts(model)
    report.warnings += [f"{name} stays dense: {reason}." for name, reason in left.items()]
    report.seconds = time.perf_counter() - start
    return report


def _quantize(model: nn.Module, batches: Sequence[CalibrationBatch], config: AwqConfig, options: QuantizeOptions) -> QuantReport:
    """`quantize_model` on a model whose experts are linears."""
    lists = find_block_lists(model)
    plan = make_plan(model, lists, config, packed=not options.export_compatible)
    skip_in_mixtures(plan, model)
    widest = max(linear_shape(model.get_submodule(name))[0] for name in plan.chosen)
    home = next(model.parameters()).device
    device = _work_device(home, options)
    batches = rebatched(batches, BATCH_TOKENS if device.type == "cpu" else max(BATCH_TOKENS, _GPU_BATCH_VALUES // widest))
    if options.tuning:
        batches = micro_batches(batches)
    report = QuantReport(config.to_dict(), asdict(options), skipped=plan.skipped, versions=_versions())
    report.tokens = sum(int(b.attention_mask.sum()) for b in batches)
    if report.tokens < ENOUGH * widest:
        report.warnings.append(
            f"{report.tokens} calibration tokens are few for linears with {widest} inputs: codes are chosen more cautiously; "
            f"{ENOUGH * widest} or more would be better."
        )
    bench = Workbench(config, options, plan, report)
    with _lent(model, device if options.tuning else home):
        _quantize_blocks(bench, model, lists, batches)
    return report


def _quantize_blocks(bench: Workbench, model: nn.Module, lists, batches: Sequence[CalibrationBatch]) -> None:
    """Every block in turn; then the tuning of what was found."""
    options, report = bench.options, bench.report
    match, judges = None, frozenset[int]()
    with bench.phase("inputs"):
        if options.tuning:
            judges = held_out(len(batches))
            match = OutputMatch(model, batches, judges)
        with watched_weights(model, bench.plan.chosen) as read:
            streams = open_streams(model, lists, batches)
        bench.plan.leave(read, "its weight is read past its forward")
        if options.correction and options.rounding == "feedback" and options.propagate == "quantized":
            for calibration, *_ in streams:
                calibration.original = list(calibration.hidden)
                calibration.unseen = judges
    total = sum(len(blocks) for _, blocks in lists)
    hide = None if options.progress is None else not options.progress
    with tqdm(total=total, desc="AWQ", unit="block", disable=hide) as bar:
        for (prefix, blocks), stream_set in zip(lists, streams):
            for index, block in enumerate(blocks):
                _quantize_block(bench, block, f"{prefix}.{index}", index, *stream_set)
                bar.set_postfix(loss=f"{report.loss:.4f}", rtn=f"{report.loss_rtn:.4f}")
                bar.update()
    if match is not None:
        with bench.phase("tuning"), _tensor_cores(next(model.parameters()).device):
            tuned, tuning = tune_scales(model, bench.weights, match, options.tuning or 0, options.seed, options.progress)
            report.tuning = asdict(tuning)
            for name, weight in tuned.items():
                _install(model, name, weight, bench.config, options)


@contextmanager
def _lent(model: nn.Module, device: torch.device):
    """The whole model on `device` for a while, where it fits: tuning sends gradients through all of it."""
    home = next(model.parameters()).device
    if home == device:
        yield
        return
    try:
        model.to(device)
    except torch.OutOfMemoryError:
        logger.warning("the model does not fit on %s: scales are tuned on %s, which takes long.", device, home)
        model.to(home)
    try:
        yield
    finally:
        model.to(home)


def _quantize_block(
    bench: Workbench, block: nn.Module, prefix: str, index: int, calibration: Stream, many: Stream, single: Stream
) -> None:
    """Quantizes one block and moves all streams past it."""
    home = next(p.device for p in block.parameters())
    dtypes = {name: tensor.dtype for name, tensor in chain(block.named_parameters(), block.named_buffers())}
    device = _work_device(home, bench.options)
    block.to(device, torch.float32)
    with bench.phase("folds"):
        with every_token(block):
            found = _folds_of(bench, block, prefix, single.at(index, device), many.at(index, device))
        groups = [g for g in found if any(f"{prefix}.{n}" in bench.plan.chosen for n in g.consumers)]
        many.advance(block, index, device)
        single.advance(block, index, device)
    with _tensor_cores(device):
        with bench.phase("statistics"):
            statistics, outputs = _gather(bench, block, prefix, groups, calibration, index, device)
        with bench.phase("search"):
            choices = [_choose(bench, block, g, statistics[statistics_name(block, g)], calibration, index, device) for g in groups]
            chosen = {name.removeprefix(f"{prefix}.") for name in bench.plan.chosen if name.startswith(f"{prefix}.")}
            parts = rounding_parts(block, groups, chosen)
            rtn_losses: dict[str, float] = {}
            for part in parts:
                rtn_losses |= round_to_nearest_losses(block, part.group, part.names, statistics[part.statistics], bench.config)
            for group, choice in zip(groups, choices):
                if group.fold is not None and choice.kind != "identity":
                    apply_fold(block, group.fold, choice.scale)
        with bench.phase("drift"):
            compared = [part.statistics for part in parts]
            original = _original_inputs(block, compared, statistics, calibration, index, device)
        results: list[QuantizedLinear] = []
        order = list(statistics)  # of first calls: a linear's input changes with those before it
        for part in sorted(parts, key=lambda part: order.index(part.statistics)):
            group, choice, names = part.group, choices[part.source], part.names
            seen = statistics[part.statistics]
            with bench.phase("drift"):
                drifted = None if original is None else _drift(block, original, part.statistics, calibration, index, device)
            with bench.phase("rounding"):
                results += quantize_group(
                    block, group, drifted or seen.divided_by(choice.scale), choice, names, bench.config, bench.options
                )
                for result in results[-len(names) :]:
                    linear: Any = block.get_submodule(result.name)
                    get_weight(linear).copy_(result.weight.dequantize())
                    if result.bias_change is not None:
                        linear.bias.add_(result.bias_change)
        with bench.phase("outputs"):
            if original is not None:
                calibration.original = original.outputs()
            if outputs is None:
                calibration.advance(block, index, device)
            else:
                calibration.hidden = outputs
        with bench.phase("packing"):
            _finish(bench, block, prefix, results, rtn_losses, home, dtypes)


def _folds_of(bench: Workbench, block: nn.Module, prefix: str, single, many) -> list[InputGroup]:
    """The block's input groups with proven folds: discovered once per structure, proven on every block."""
    structure = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    torch.manual_seed(bench.options.seed)
    known = bench.known.get(structure)
    if known is not None:
        proven = prove(block, known, many)
        if sum(g.fold is not None for g in proven) == sum(g.fold is not None for g in known):
            return proven
    groups = prove(block, discover(block, single, many), many)
    bench.known[structure] = groups
    for group in groups:
        if group.fold is None:
            logger.info("%s: %s keeps scale 1: %s", prefix, ", ".join(group.consumers), group.reason)
    return groups


def _gather(
    bench: Workbench, block: nn.Module, prefix: str, groups: list[InputGroup], stream: Stream, index: int, device: torch.device
) -> tuple[dict[str, InputStatistics], list[Tensor] | None]:
    """Statistics of every group's input; the original block's outputs too, when they are what the next block gets."""
    holder, outputs = MaskHolder(), []
    keep = bench.options.propagate == "original"
    names = [part.statistics for part in rounding_parts(block, groups, {n for g in groups for n in g.consumers})]
    routed = [name for name in names if expert_of(block, name)]
    layers = list(named_experts(block))
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    shared = [name for name in names if name not in routed]
    with (
        collect_inputs(block, [*shared, *layers], holder) as statistics,
        collect_experts(block, routed, holder, statistics, seen),
    ):
        for (call, hidden), mask in zip(stream.at(index, device), stream.masks):
            holder.mask = None if mask is None else mask.to(device)
            out = call.run(block, hidden)
            if keep:
                outputs.append(out)
    for group in groups:
        if not expert_of(block, group.consumers[0]):
            statistics.setdefault(group.consumers[0], InputStatistics(group.in_features, device))
    for owner, tokens in complete_experts(block, statistics, routed, seen).items():
        bench.report.experts[f"{prefix}.{owner}"] = tokens
    for name, found in statistics.items():
        if found.dropped:
            bench.report.warnings.append(
                f"block {index}, {name}: {found.dropped} tokens with non-finite activations were left out."
            )
        found.fill()
    return statistics, outputs if keep else None


def _original_inputs(
    block: nn.Module, names: list[str], statistics: dict[str, InputStatistics], stream: Stream, index: int,
    device: torch.device,
) -> OriginalInputs | None:  # fmt: skip
    """What the block's linears read in the original model; the block is copied as it is now, folded and not yet quantized."""
    if stream.original is None:
        return None
    names = [name for name in names if _once_per_token(statistics[name], stream)]
    calls = [calls[index].to(device, torch.float32) for calls in stream.calls]
    return OriginalInputs(deepcopy(block), names, calls, [h.to(device).float() for h in stream.original], stream.unseen)


def _once_per_token(statistics: InputStatistics, stream: Stream) -> bool:
    """Whether an input comes once for every token: an expert's cannot be compared between two models."""
    real = sum(h.shape[0] * h.shape[1] if m is None else int(m.sum()) for h, m in zip(stream.hidden, stream.masks))
    once = statistics.calls == len(stream.hidden) and statistics.tokens + statistics.dropped == real
    return once and statistics.tokens > 0


def _drift(
    block: nn.Module, original: OriginalInputs, name: str, stream: Stream, index: int, device: torch.device
) -> DriftStatistics | None:
    """Statistics of a linear's input now and in the original block; None for one that cannot be compared."""
    if name not in original.names:
        return None
    found = DriftStatistics(linear_shape(block.get_submodule(name))[0], device)
    for i, ((call, hidden), mask) in enumerate(zip(stream.at(index, device), stream.masks)):
        if i not in stream.unseen:
            now = input_of(block, name, call, hidden)
            found.add_pair(now, original.of(name, i), None if mask is None else mask.to(device))
    found.fill()
    return found


def _choose(bench: Workbench, block: nn.Module, group: InputGroup, statistics, stream: Stream, index: int, device):
    judge = None
    if bench.options.objective == "module" and group.fold is not None and statistics.tokens:

        def run() -> None:
            for call, hidden in stream.at(index, device):
                call.run(block, hidden)

        calls = record_module_calls(block, enclosing_module(group.consumers), run)
        masks = [None if m is None else m.to(device) for m in stream.masks]
        judge = module_loss(block, group, calls, masks, bench.config)
    choice = choose_scale(block, group, statistics, bench.config, bench.options, judge)
    if choice.kind == "identity" and choice.loss != choice.loss and group.fold is not None and bench.options.scaling:
        bench.report.warnings.append(f"block {index}, {', '.join(group.consumers)}: no finite loss; scale 1 is kept.")
    return choice


def _finish(bench: Workbench, block: nn.Module, prefix: str, results, rtn_losses, home: torch.device, dtypes) -> None:
    """Packs the quantized linears, restores the block's dtype and device, and writes the report's lines."""
    for result in results:
        dtype = dtypes[f"{result.name}.weight"]
        _install(block, result.name, result.weight, bench.config, bench.options, dtype)
        if bench.options.tuning:
            bench.weights[f"{prefix}.{result.name}"] = result.weight
        result.report.loss_rtn = rtn_losses[result.name]
        result.report.name = f"{prefix}.{result.name}"
        bench.report.linears.append(result.report)
    block.to(home)
    for name, tensor in chain(block.named_parameters(), block.named_buffers()):
        if name in dtypes and tensor.dtype != dtypes[name]:  # each as it was: some models keep norms or tables in float32
            tensor.data = tensor.data.to(dtypes[name])


@contextmanager
def _tensor_cores(device: torch.device):
    """float32 products in TF32 on a GPU, several times faster: losses move by 1e-4. Proofs of folds stay outside."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _install(
    root: nn.Module,
    name: str,
    weight: QuantizedWeight,
    config: AwqConfig,
    options: QuantizeOptions,
    dtype: torch.dtype | None = None,
) -> None:
    """Puts a quantized weight into the model: packed, or as the values of the ordinary linear. dtype: of the model, where the
    linear's is another one for now."""
    linear: Any = root.get_submodule(name)
    if options.export_compatible:
        get_weight(linear).copy_(weight.dequantize())
    else:
        dtype = dtype or linear.weight.dtype
        replace_module(root, name, WQLinear.from_quantized(weight, getattr(linear, "bias", None), config.format, dtype=dtype))


def _work_device(home: torch.device, options: QuantizeOptions) -> torch.device:
    if options.device is not None:
        return torch.device(options.device)
    if home.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return home


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
