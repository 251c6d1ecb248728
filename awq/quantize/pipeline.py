"""The block-by-block pipeline: only one block's activations and statistics are in memory at a time.

For every block: prove its folds on a few tokens, gather the Gram matrix of each distinct linear
input in one forward over the calibration tokens, choose and fold scales, quantize, and hand the
*quantized* block's outputs to the next one, so that error feedback corrects what its predecessors
did (measured: docs/notes/quality.md). The steps are in `block`, what they share in `run`, and the
way from block to block in `awq.nn.walk`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import nn
from tqdm import tqdm

from awq.calibration import CalibrationBatch
from awq.checkpoint.expert_names import expert_names
from awq.config import AwqConfig
from awq.nn.expose import conceal_experts, expose_experts
from awq.nn.modes import ordinary_arithmetic
from awq.nn.packed_experts import pack_experts
from awq.nn.presence import BlockStore
from awq.nn.sorted_products import conceal_sorted, expose_sorted
from awq.nn.surgery import device_of
from awq.nn.unfinished import check_finished, unfinished
from awq.nn.walk import BlockVisit
from awq.quantize.block import BlockQuantizer
from awq.quantize.forecast import reserve
from awq.quantize.match import Embed, OutputMatch
from awq.quantize.options import QuantizeOptions
from awq.quantize.progress import ProgressLines
from awq.quantize.report import QuantReport
from awq.quantize.run import QuantizeRun, moved_to, one_at_a_time, tensor_cores, work_device
from awq.quantize.tuning import tune_weights


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    batches: Sequence[CalibrationBatch],
    config: AwqConfig | None = None,
    options: QuantizeOptions | None = None,
    store: BlockStore | None = None,
    embed: Embed | None = None,
) -> QuantReport:
    """Quantizes every linear in the model's repeated blocks, in place.

    model: a transformers model on one device. batches: token ids and masks [batch, tokens]; padding
    never enters a statistic. Linears become `WQLinear`, or stay dense with quantized values when
    `options.export_compatible`. Raises ConfigError, CalibrationError or ModelError before any
    weight is touched. A model that an error or Ctrl-C leaves half done is marked
    (`awq.nn.unfinished`): nobody quantizes, saves or serves it by mistake.
    store: brings each block's weights and takes the result away, for a model that does not hold
    them (`awq.checkpoint.streaming`).
    embed: what an embedding model makes of its hidden states; tuning aims at it.
    """
    began = time.perf_counter()
    config, options = config or AwqConfig(), options or QuantizeOptions()
    check_finished(model)
    device = work_device(device_of(model), options)

    with (
        ordinary_arithmetic(),
        one_at_a_time(device, options),
        experts_as_linears(model, store) as dense_experts,
    ):
        run = QuantizeRun.start(model.eval(), batches, config, options, store)
        run.began = began
        if store is not None:
            planned = reserve(run, store.folder)
            run.report.resources["planned"] = {
                "memory": planned.ram,
                "gpu_memory": planned.gpu,
                "seconds": planned.seconds,
            }

        with moved_to(model, run.device if options.tuning else device_of(model)):
            with run.phase("inputs"):
                match = run.output_match(embed)
                walk = run.walk()
                run.go_on(walk)

            hide = None if options.progress is None else not options.progress
            lines = ProgressLines("block", len(walk))
            with unfinished(model), tqdm(walk, desc="AWQ", unit="block", disable=hide) as bar:
                for done, visit in enumerate(bar, 1):
                    quantize_block(run, visit)
                    bar.set_postfix(loss=f"{run.report.loss:.4f}", rtn=f"{run.report.loss_rtn:.4f}")
                    lines.done(done, f"loss {run.report.loss:.4f}")

            if match is not None:
                with unfinished(model):
                    tune(run, match)

    run.report.warnings += [
        f"{name} stays dense: {reason}." for name, reason in dense_experts.items()
    ]
    taken = run.taken()
    run.report.seconds = taken["seconds"]
    run.report.resources["measured"] = taken

    return run.report


@contextmanager
def experts_as_linears(
    model: nn.Module, store: BlockStore | None = None
) -> Iterator[dict[str, str]]:
    """Experts that a layer holds in stacked parameters are linears inside; packed ones behind one
    contract share one module afterwards.

    Yields name → reason for the layers of experts that cannot be shown as linears.
    """
    try:
        judge = None if store is None else store.why_not_expose
        expose_sorted(model)
        yield expose_experts(model, expert_names(model), judge)
    finally:
        pack_experts(model)
        conceal_experts(model)
        conceal_sorted(model)


def quantize_block(run: QuantizeRun, visit: BlockVisit) -> None:
    """Quantizes one block and moves the calibration inputs past it."""
    block = BlockQuantizer(run, visit)
    with run.phase("folds"):
        block.find_folds()
    with tensor_cores(visit.device):
        with run.phase("statistics"):
            block.gather_statistics()
        with run.phase("search"):
            block.fold_scales()
        with run.phase("input error"):
            block.note_original_inputs()

        block.round_weights()
        with run.phase("outputs"):
            block.advance()

    with run.phase("packing"):
        block.pack()


def tune(run: QuantizeRun, match: OutputMatch) -> None:
    """Tunes all quantized linears and dense vectors on the whole model's output, and installs what
    was found."""
    options = run.options
    with run.phase("tuning"), tensor_cores(device_of(run.model)):
        weights, tuning = tune_weights(
            run.model,
            run.weights,
            match,
            options.tuning or 0,
            options.seed,
            options.progress,
            run.leans,
        )
        for name, weight in weights.items():
            run.install(run.model, name, name, weight)

    run.report.tuning = asdict(tuning)
