"""What a run that has just started will need: memory, disk and time, and whether they are there.

`forecast` is asked by `plan_quantization` and by every streamed run before its work.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awq.calibration.batches import BATCH_TOKENS
from awq.config import AwqConfig
from awq.core.team import present_team
from awq.errors import CheckpointError, ConfigError, ModelError
from awq.formats import get_format
from awq.nn.blocks import BlockList, block_names
from awq.nn.hidden import Room
from awq.nn.memory import available_memory, resident_memory
from awq.nn.recording import record_block_calls
from awq.nn.surgery import device_of, linear_shape
from awq.quantize.resources import (
    BlockShape,
    Work,
    activation_bytes,
    block_peak,
    block_seconds,
    block_shape,
    measured_rates,
)
from awq.quantize.run import QuantizeRun

GB = 1e9
# Bytes of code that is loaded while a run works: kernels and codecs; with a GPU CUDA's libraries
# and Triton's compiler, 0.42 to 0.67 GB on an H200.
LOADED_LATER = 20_000_000
LOADED_LATER_FOR_A_GPU = 550_000_000
DISK_RATE = 1e9  # bytes a second that a disk reads; slower ones make a run longer


@dataclass(frozen=True)
class Forecast:
    """Of a streamed run, in bytes and seconds.

    ram: peak of the process's resident memory; gpu: of allocated GPU memory, 0 on a CPU; disk: of
    the output and what lies beside it until then; activations: the part of `ram` that may lie on
    the disk instead; seconds: on this machine, without reading calibration data.
    """

    ram: int
    gpu: int
    disk: int
    activations: int
    seconds: float

    def on_disk(self, budget: int) -> Forecast:
        """With all activations beyond `budget` bytes on the disk."""
        moved = max(0, self.activations - budget)
        return Forecast(
            self.ram - moved, self.gpu, self.disk + moved, self.activations - moved, self.seconds
        )


def forecast(run: QuantizeRun, work: Work) -> Forecast:
    """Of a run that is to be calibrated on `work`. run.model: blocks may stand on the meta
    device."""
    model, options, kind = run.model, run.options, run.device.type
    shapes = block_shapes(run)
    rates = measured_rates(run.device)
    later = LOADED_LATER if kind == "cpu" else LOADED_LATER_FOR_A_GPU
    before = resident_memory() + later
    peaks = [block_peak(shape, work, options, kind) for shape, _ in shapes]
    stored = max(shape.stored for shape, _ in shapes)
    hidden = activation_bytes(work, options)
    inside = max(peaks) if kind == "cpu" else 2 * stored  # the next one is read ahead
    outside = _stored_outside(model)
    after = bytes_after(model, run.plan.targets, run.config)
    blocks = sum(shape.stored * count for shape, count in shapes)
    seconds = sum(count * block_seconds(s, work, options, rates) for s, count in shapes)

    return Forecast(
        # `before` holds what lies outside the blocks; a save copies it once more
        ram=before + max(inside + hidden, outside),
        gpu=0 if kind == "cpu" else max(peaks),
        disk=after + 2 * hidden,  # hidden states are replaced when the next ones are there
        activations=hidden,
        seconds=seconds + (blocks + after) / DISK_RATE,
    )


def reserve(run: QuantizeRun, output: Path | None) -> Forecast:
    """Compares a streamed run's needs with what there is, before its work, and gives its
    activations their room. Returns what the run will need.

    output: beside it everything is written; None: the disk is not asked. Raises ConfigError or
    CheckpointError with what is missing.
    """
    assert run.store is not None
    needed = forecast(run, work_of(run))
    fitting = check_memory(needed)
    if output is not None:
        check_disk(output, fitting.disk)
        run.store.room = Room(fitting.activations, output)

    return fitting


def work_of(run: QuantizeRun) -> Work:
    """What a run is calibrated on."""
    sizes = [batch.attention_mask.numel() for batch in run.batches]
    return Work(sum(sizes), max(sizes), hidden_features(run.model))


def planned_work(model: Any, tokens: int) -> Work:
    """What calibration on so many tokens would be."""
    return Work(tokens, min(tokens, BATCH_TOKENS), hidden_features(model))


def hidden_features(model: Any) -> int:
    """Of the hidden states: as wide as the embeddings, where the config does not say."""
    text = model.config.get_text_config()
    found = getattr(text, "hidden_size", None) or getattr(text, "d_model", None)
    return int(found or model.get_input_embeddings().weight.shape[1])


def check_memory(needed: Forecast) -> Forecast:
    """The forecast with as many activations on the disk as memory asks for. Raises ConfigError with
    the missing amount where even that is too much."""
    if needed.gpu:
        free, _ = torch.cuda.mem_get_info()
        if free < needed.gpu:
            raise ConfigError(_lack("GPU memory", needed.gpu, free))

    free_ram = available_memory()
    if free_ram is None:
        return needed

    free_ram = free_ram // present_team().here + resident_memory()
    fitting = needed.on_disk(max(0, free_ram - (needed.ram - needed.activations)))
    if fitting.ram > free_ram:
        raise ConfigError(_lack("memory", fitting.ram, free_ram))
    return fitting


def check_disk(place: Path, needed: int) -> None:
    """Raises CheckpointError with the missing amount."""
    home = next(folder for folder in [place, *place.parents] if folder.exists())
    free = shutil.disk_usage(home).free
    if free < needed:
        raise CheckpointError(f"{place}: {_lack('disk', needed, free)}")


def _lack(what: str, needed: int, free: int) -> str:
    missing = (needed - free) / GB
    return (
        f"{needed / GB:.2f} GB of {what} are needed, and {free / GB:.2f} GB are free; "
        f"{missing:.2f} GB are missing."
    )


def block_shapes(run: QuantizeRun) -> list[tuple[BlockShape, int]]:
    """Every distinct shape among the blocks that are quantized, and how many have it."""
    counts: dict[BlockShape, int] = {}
    for entry in run.lists:
        calls = _calls_of(run, entry)
        for name, block, (call, hidden) in zip(block_names(entry), entry[1], calls):
            shape = block_shape(name, block, run.plan, run.config, call, hidden)
            if shape.groups:
                counts[shape] = counts.get(shape, 0) + 1
    return list(counts.items())


def _calls_of(run: QuantizeRun, entry: BlockList) -> list:
    """(arguments, hidden states) of each block of a list, or of Nones where they are not known."""
    home = device_of(run.model)
    item = {}
    for name, tensor in run.batches[0].model_inputs().items():
        item[name] = tensor[:1].to(home)
    try:
        recorded = record_block_calls(run.model, [entry], [item])
    except ModelError:
        return [(None, None)] * len(entry[1])

    calls, hidden = recorded.calls[0][0], recorded.hidden[0][0]
    return [(call, hidden) for call in calls]


def _stored_outside(model: nn.Module) -> int:
    """Bytes of the tensors that are not on the meta device."""
    tensors = chain(model.parameters(), model.buffers())
    return sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)


def bytes_of(tensors: dict[str, Tensor]) -> int:
    """Of all tensors; those that stand under several names count once."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in tensors.values()}.values())


def bytes_after(model: nn.Module, targets: Collection[str], config: AwqConfig) -> int:
    """With packed tensors in the place of the targets' weights."""
    dense = model.state_dict(keep_vars=True)
    for name in targets:
        dense.pop(f"{name}.weight", None)
    return bytes_of(dense) + sum(_packed_bytes(model, name, config) for name in targets)


def _packed_bytes(model: nn.Module, name: str, config: AwqConfig) -> int:
    """Of one linear in the format of the files."""
    inputs, outputs = linear_shape(model.get_submodule(name))
    group_size = config.group_size_of(inputs, name)
    shapes = get_format(config.format).shapes(inputs, outputs, group_size)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
