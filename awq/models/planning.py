"""`plan_quantization`: what a quantization will do, known before any of its work."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from awq.calibration import CalibrationBatch
from awq.checkpoint.directory import check_target
from awq.checkpoint.streaming import StreamedBlocks
from awq.config import AwqConfig
from awq.embed.directory import is_sentence_model
from awq.models.auto import AutoAWQForCausalLM, AutoAWQForEmbedding
from awq.models.streaming import open_full_precision
from awq.quantize import QuantizeOptions
from awq.quantize.checks import check_exclusions
from awq.quantize.forecast import (
    bytes_after,
    bytes_of,
    check_disk,
    check_memory,
    forecast,
    planned_work,
)
from awq.quantize.parallelism import split_inputs, tensor_parallel
from awq.quantize.pipeline import experts_as_linears
from awq.quantize.run import QuantizeRun

_PROBE_TOKENS = 16
_SAMPLES = 128  # of calibration, where nobody says how many
_GB = 1e9


@dataclass
class QuantizationPlan:
    """What `quantize` will do to a model.

    linears: full names of those that will be quantized. skipped: full name → why a linear stays as
    it is. bytes_before, bytes_after: of all tensors in memory or on disk. parallel: how far engines
    can split the result. ram, gpu, disk: bytes that streaming takes at its peak, of the process's
    resident memory, of GPU memory (0 on a CPU) and of the disk. activations: bytes of `disk` that
    found no room in memory. seconds: about, on this machine.
    """

    linears: list[str]
    skipped: dict[str, str]
    bytes_before: int
    bytes_after: int
    parallel: str
    ram: int = 0
    gpu: int = 0
    disk: int = 0
    activations: int = 0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        """A few lines for a terminal."""
        left = f"{len(self.skipped)} left as they are" if self.skipped else "none left out"
        before = self.bytes_before / _GB
        after = self.bytes_after / _GB
        share = self.bytes_after / self.bytes_before

        return "\n".join(
            [
                f"{len(self.linears)} linears to quantize, {left}",
                *(f"  {name}: {reason}" for name, reason in _by_reason(self.skipped).items()),
                f"{before:.2f} GB before, {after:.2f} GB after ({share:.0%})",
                self._needs(),
                self.parallel,
                *(f"warning: {text}" for text in self.warnings),
            ]
        )

    def _needs(self) -> str:
        gpu = f", {self.gpu / _GB:.2f} GB of GPU memory" if self.gpu else ""
        ram = self.ram / _GB
        disk = self.disk / _GB
        duration = timedelta(seconds=round(self.seconds))

        return (
            f"streamed (--stream): {ram:.2f} GB of memory{gpu}, {disk:.2f} GB of disk, about "
            f"{duration} on this machine"
        )


def plan_quantization(
    source: str | Path,
    output: str | Path | None = None,
    quant_config: Any = None,
    *,
    torch_dtype: Any = "auto",
    trust_remote_code: bool = False,
    max_calib_samples: int | None = None,
    max_calib_seq_len: int = 512,
    **options: Any,
) -> QuantizationPlan:
    """Which linears of the model in `source` would be quantized, and how large the result would be.

    Only the embeddings and what else lies outside the blocks are loaded: a model of any size is
    planned in seconds. output: where the result would be written; None asks nothing about the disk.
    Other arguments: of `quantize_directory`; options: of `QuantizeOptions`. Memory is that of
    streaming, for as many calibration tokens as the arguments allow.

    Raises what quantizing would raise for this model and settings before its work, ConfigError when
    memory does not do, and CheckpointError when the disk lacks space, with the missing amount.
    Needs transformers 5.

    >>> plan = plan_quantization("my-model", quant_config={"q_group_size": 16})
    >>> len(plan.linears)
    21
    """
    place = None if output is None else check_target(output, source)
    opened = open_full_precision(source, trust_remote_code)
    if isinstance(quant_config, AwqConfig):
        config = quant_config
    else:
        config = AwqConfig.from_dict(quant_config)

    door = AutoAWQForEmbedding if is_sentence_model(source) else AutoAWQForCausalLM
    blocks = StreamedBlocks(opened, None, torch_dtype, door._class_of(opened))
    check_exclusions(blocks.model, config.modules_to_not_convert)
    chosen = QuantizeOptions(**options)
    tokens = (max_calib_samples or _SAMPLES) * max_calib_seq_len
    if chosen.rounding == "feedback" and door is AutoAWQForCausalLM:
        tokens *= 2  # general texts join the caller's

    plan = _planned(blocks, config, chosen, tokens)
    if place is not None:
        check_disk(place, plan.disk)
    return plan


@torch.no_grad()
def _planned(
    blocks: StreamedBlocks,
    config: AwqConfig,
    options: QuantizeOptions,
    tokens: int,
) -> QuantizationPlan:
    """The plan of a run that is started and not worked through."""
    model = blocks.model
    ids = torch.arange(_PROBE_TOKENS).unsqueeze(0)
    with experts_as_linears(model, blocks):
        batches = [CalibrationBatch(ids, torch.ones_like(ids))]
        run = QuantizeRun.start(model, batches, config, options, blocks)
        run.walk()  # which finds linears whose weight somebody else reads
        targets = run.plan.targets
        needed = forecast(run, planned_work(model, tokens))
        fitting = check_memory(needed)
        parallel = tensor_parallel(split_inputs(model, targets), config.group_size)

        return QuantizationPlan(
            sorted(targets),
            run.plan.skipped,
            bytes_of(model.state_dict(keep_vars=True)),
            bytes_after(model, targets, config),
            str(parallel),
            fitting.ram,
            fitting.gpu,
            fitting.disk,
            needed.activations - fitting.activations,
            round(fitting.seconds, 1),
            run.plan.warnings,
        )


def _by_reason(skipped: dict[str, str]) -> dict[str, str]:
    """The first name and the number of the others → reason, once for every reason."""
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name)
    return {
        found[0] + (f" and {len(found) - 1} more" if len(found) > 1 else ""): reason
        for reason, found in names.items()
    }
