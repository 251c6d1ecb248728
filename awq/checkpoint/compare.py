"""What differs between two quantized directories: settings, sizes, integers, reported errors.

Linears are compared after unpacking, one at a time, so versions that arrange the same integers
differently compare equal.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from awq.checkpoint.convert import read_packed
from awq.checkpoint.files import REPORT_FILE, PackedTensors, read_json, weight_files
from awq.checkpoint.source import Source, body_directory
from awq.config import AwqConfig


@dataclass(frozen=True)
class Comparison:
    """Two directories side by side.

    settings: name → (first, second). shared: linears packed in both; equal: those whose integers,
    zeros and scales are all
    the same. differing_weights: name → share of integers that differ, the largest first; 1.0 where
    shapes differ.
    losses: mean relative output errors of the two reports, None unless both have one.
    """

    settings: dict[str, tuple[Any, Any]]
    weight_bytes: tuple[int, int]
    shared: int
    equal: int
    only_first: list[str]
    only_second: list[str]
    losses: tuple[float, float] | None
    differing_weights: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_checkpoints(first: str | Path, second: str | Path) -> Comparison:
    """Compares two local quantized directories. Raises ConfigError or CheckpointError when one is
    none."""
    sources = [Source.open_directory(first), Source.open_directory(second)]
    configs = [source.settings for source in sources]
    packed = [source.packed for source in sources]
    shared = [name for name in packed[0] if name in packed[1]]
    differing = {}
    equal = 0
    for name in shared:
        same, share = _difference(name, packed, configs)
        equal += same
        if not same:
            differing[name] = share
    return Comparison(
        settings=_settings(configs),
        weight_bytes=(_size(sources[0]), _size(sources[1])),
        shared=len(shared),
        equal=equal,
        only_first=sorted(packed[0].keys() - packed[1].keys()),
        only_second=sorted(packed[1].keys() - packed[0].keys()),
        losses=_losses(sources),
        differing_weights=dict(sorted(differing.items(), key=lambda item: -item[1])),
    )


def _settings(configs: list[AwqConfig]) -> dict[str, tuple[Any, Any]]:
    first, second = (config.to_dict() for config in configs)
    names = ("w_bit", "q_group_size", "zero_point", "version")
    return {name: (first[name], second[name]) for name in names}


def _difference(
    name: str, packed: list[PackedTensors], configs: list[AwqConfig]
) -> tuple[bool, float]:
    """Whether all three tensors are the same, and the share of integers that differ."""
    first, second = (
        read_packed(name, tensors[name], config) for tensors, config in zip(packed, configs)
    )
    if first.codes.shape != second.codes.shape:
        return False, 1.0
    same = all(torch.equal(a, b) for a, b in zip(first[:3], second[:3]))
    return same, float((first.codes != second.codes).double().mean())


def _size(source: Source) -> int:
    return sum(file.stat().st_size for file in weight_files(body_directory(Path(source.name))))


def _losses(sources: list[Source]) -> tuple[float, float] | None:
    found = []
    for source in sources:
        path = Path(source.name) / REPORT_FILE
        loss = read_json(path).get("loss") if path.is_file() else None
        if not isinstance(loss, (int, float)):
            return None
        found.append(float(loss))
    return found[0], found[1]
