"""`plan_quantization`: what a quantization will do, known before any of its work."""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awq.calibration import CalibrationBatch
from awq.checkpoint.directory import check_target
from awq.checkpoint.streaming import StreamedBlocks
from awq.config import AwqConfig
from awq.embed.directory import is_sentence_model
from awq.errors import CheckpointError
from awq.formats import get_format
from awq.models.auto import AutoAWQForCausalLM, AutoAWQForEmbedding
from awq.models.streaming import open_full_precision
from awq.nn.surgery import linear_shape
from awq.quantize import QuantizeOptions
from awq.quantize.checks import check_exclusions
from awq.quantize.parallelism import split_inputs, tensor_parallel
from awq.quantize.pipeline import experts_as_linears
from awq.quantize.run import QuantizeRun

_PROBE_TOKENS = 16
_GB = 1e9


@dataclass
class QuantizationPlan:
    """What `quantize` will do to a model.

    linears: full names of those that will be quantized. skipped: full name → why a linear stays as
    it is. bytes_before, bytes_after: of all tensors in memory or on disk. parallel: how far engines
    can split the result.
    """

    linears: list[str]
    skipped: dict[str, str]
    bytes_before: int
    bytes_after: int
    parallel: str
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        """A few lines for a terminal."""
        left = f"{len(self.skipped)} left as they are" if self.skipped else "none left out"
        before, after = self.bytes_before / _GB, self.bytes_after / _GB
        share = self.bytes_after / self.bytes_before
        return "\n".join(
            [
                f"{len(self.linears)} linears to quantize, {left}",
                *(f"  {name}: {reason}" for name, reason in _by_reason(self.skipped).items()),
                f"{before:.2f} GB before, {after:.2f} GB after ({share:.0%})",
                self.parallel,
                *(f"warning: {text}" for text in self.warnings),
            ]
        )


def plan_quantization(
    source: str | Path,
    output: str | Path | None = None,
    quant_config: Any = None,
    *,
    torch_dtype: Any = "auto",
    trust_remote_code: bool = False,
) -> QuantizationPlan:
    """Which linears of the model in `source` would be quantized, and how large the result would be.

    Only the embeddings and what else lies outside the blocks are loaded: a model of any size is
    planned in seconds. output: where the result would be written; None asks nothing about the disk.
    Other arguments: of `quantize_directory`.

    Raises what quantizing would raise for this model and settings before its work, and
    CheckpointError when the disk lacks space, with the missing amount. Needs transformers 5.

    >>> plan = plan_quantization("my-model", quant_config={"q_group_size": 16})
    >>> len(plan.linears)
    21
    """
    place = None if output is None else check_target(output, source)
    opened = open_full_precision(source, trust_remote_code)
    config = (
        quant_config if isinstance(quant_config, AwqConfig) else AwqConfig.from_dict(quant_config)
    )
    door = AutoAWQForEmbedding if is_sentence_model(source) else AutoAWQForCausalLM
    blocks = StreamedBlocks(opened, None, torch_dtype, door._class_of(opened))
    check_exclusions(blocks.model, config.modules_to_not_convert)
    plan = _planned(blocks, config)
    if place is not None:
        _check_disk(place, plan.bytes_after)
    return plan


@torch.no_grad()
def _planned(blocks: StreamedBlocks, config: AwqConfig) -> QuantizationPlan:
    """The plan of a run that is started and not worked through."""
    model = blocks.model
    ids = torch.arange(_PROBE_TOKENS).unsqueeze(0)
    with experts_as_linears(model, blocks):
        batches = [CalibrationBatch(ids, torch.ones_like(ids))]
        run = QuantizeRun.start(model, batches, config, QuantizeOptions(), blocks)
        run.walk()  # which finds linears whose weight somebody else reads
        targets = run.plan.targets
        parallel = tensor_parallel(split_inputs(model, targets), config.group_size)
        return QuantizationPlan(
            sorted(targets),
            run.plan.skipped,
            _bytes_of(model.state_dict(keep_vars=True)),
            _bytes_after(model, targets, config),
            str(parallel),
            run.plan.warnings,
        )


def _bytes_of(tensors: dict[str, Tensor]) -> int:
    """Of all tensors; those that stand under several names count once."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in tensors.values()}.values())


def _bytes_after(model: nn.Module, targets: Collection[str], config: AwqConfig) -> int:
    """With packed tensors in the place of the targets' weights."""
    dense = model.state_dict(keep_vars=True)
    for name in targets:
        dense.pop(f"{name}.weight", None)
    return _bytes_of(dense) + sum(_packed_bytes(model, name, config) for name in targets)


def _packed_bytes(model: nn.Module, name: str, config: AwqConfig) -> int:
    """Of one linear in the format of the files."""
    inputs, outputs = linear_shape(model.get_submodule(name))
    group_size = config.group_size_of(inputs, name)
    shapes = get_format(config.format).shapes(inputs, outputs, group_size)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())


def _check_disk(place: Path, needed: int) -> None:
    home = next(folder for folder in [place, *place.parents] if folder.exists())
    free = shutil.disk_usage(home).free
    if free < needed:
        raise CheckpointError(
            f"{place} needs {needed / _GB:.2f} GB, and {free / _GB:.2f} GB are free on its disk; "
            f"{(needed - free) / _GB:.2f} GB are missing."
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
