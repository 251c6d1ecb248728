"""What differs between two quantized directories: settings, sizes, integers, reported errors.

Linears are compared after unpacking, one at a time, so versions that arrange the same integers
differently compare equal.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from awq.checkpoint.files import REPORT_FILE, read_json, weight_files
from awq.checkpoint.packed import PackedCheckpoint
from awq.checkpoint.source import Source, body_directory


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
    one = PackedCheckpoint.open(first)
    two = PackedCheckpoint.open(second)
    shared = [name for name in one.linears if name in two.linears]

    differing = {}
    equal = 0
    for name in shared:
        same, share = _difference(name, one, two)
        equal += same
        if not same:
            differing[name] = share

    return Comparison(
        settings=_settings(one, two),
        weight_bytes=(_size(one.source), _size(two.source)),
        shared=len(shared),
        equal=equal,
        only_first=sorted(one.linears.keys() - two.linears.keys()),
        only_second=sorted(two.linears.keys() - one.linears.keys()),
        losses=_losses([one.source, two.source]),
        differing_weights=dict(sorted(differing.items(), key=lambda item: -item[1])),
    )


def _settings(one: PackedCheckpoint, two: PackedCheckpoint) -> dict[str, tuple[Any, Any]]:
    first, second = (opened.config.to_dict() | {"version": opened.layout} for opened in (one, two))
    names = ("w_bit", "q_group_size", "zero_point", "version")
    return {name: (first[name], second[name]) for name in names}


def _difference(name: str, one: PackedCheckpoint, two: PackedCheckpoint) -> tuple[bool, float]:
    """Whether all three tensors are the same, and the share of integers that differ."""
    first = one.read(name)
    second = two.read(name)
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
