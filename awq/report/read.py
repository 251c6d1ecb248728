"""Reads `quantization_report.json`, the file that `save_quantized` writes beside the weights.

Reports of older versions, and of runs that measured less, lack keys. A view gives such parts as
empty, so that the page leaves a section out instead of failing.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from awq.checkpoint.files import REPORT_FILE, read_json
from awq.errors import CheckpointError

_NUMBERS = ("loss", "loss_rtn", "tokens", "seconds")
_TABLES = (
    "config",
    "options",
    "versions",
    "phases",
    "evaluation",
    "experts",
    "skipped",
    "resources",
)
_BLOCK_INDEX = re.compile(r"^(?P<before>.*?)\.(?P<index>\d+)\.(?P<role>.+)$")


@dataclass(frozen=True)
class Linear:
    """One quantized linear as the report tells it; `block` is −1 where its name has no index."""

    name: str
    block: int
    role: str
    shape: tuple[int, ...]
    loss: float
    loss_nearest: float
    kind: str
    ratio: float
    clip_fraction: float
    producer: str
    reason: str


@dataclass(frozen=True)
class ReportView:
    """What the page draws."""

    title: str
    linears: list[Linear]
    raw: dict[str, Any]
    skipped: dict[str, str] = field(default_factory=dict)
    experts: dict[str, list[float]] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        return float(self.raw.get("loss") or 0.0)

    @property
    def loss_nearest(self) -> float:
        return float(self.raw.get("loss_rtn") or 0.0)

    @property
    def resources(self) -> dict[str, dict[str, float]]:
        """ "measured" and, of a streamed run, "planned" → bytes of memory, seconds."""
        return self.raw.get("resources") or {}

    @property
    def blocks(self) -> int:
        return 1 + max((linear.block for linear in self.linears), default=-1)


def read_report(path: str | Path) -> ReportView:
    """The report of a quantized directory, or a report file itself.

    Raises CheckpointError when there is none, or it is no report.

    >>> view = read_report("my-model-awq")
    >>> view.loss < view.loss_nearest
    True
    """
    path = Path(path)
    file = path / REPORT_FILE if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(
            f"{file} does not exist; `save_quantized` writes it into the directory it saves."
        )

    raw = read_json(file)
    try:
        _check_kinds(raw)
        return ReportView(
            title=file.resolve().parent.name,
            linears=[_linear(entry) for entry in raw["linears"]],
            raw=raw,
            skipped={name: str(reason) for name, reason in (raw.get("skipped") or {}).items()},
            experts={
                name: [_number(count) for count in tokens["routed"]]
                for name, tokens in (raw.get("experts") or {}).items()
            },
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is no quantization report: {error!r}.") from error


def _check_kinds(raw: dict[str, Any]) -> None:
    """Raises TypeError or ValueError when a part that is there is not what a report has in its
    place."""
    for name in _TABLES:
        if not isinstance(raw.get(name) or {}, dict):
            raise TypeError(f"{name} is no table")

    for value in (*(raw.get(name) or 0 for name in _NUMBERS), *(raw.get("phases") or {}).values()):
        _number(value)
    for needs in (raw.get("resources") or {}).values():
        for value in needs.values():
            _number(value)

    if not isinstance(raw.get("warnings") or [], list):
        raise TypeError("warnings are no list")


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r:.40} is no finite number")
    return float(value)


def _linear(entry: dict[str, Any]) -> Linear:
    match = _BLOCK_INDEX.match(entry["name"])
    return Linear(
        name=entry["name"],
        block=int(match["index"]) if match else -1,
        role=match["role"] if match else entry["name"],
        shape=tuple(entry.get("shape") or ()),
        loss=_number(entry["loss"]),
        loss_nearest=_number(entry["loss_rtn"]),
        kind=str(entry.get("kind", "")),
        ratio=_number(entry.get("ratio") or 0.0),
        clip_fraction=_number(entry.get("clip_fraction") or 0.0),
        producer=str(entry.get("producer") or ""),
        reason=str(entry.get("reason") or ""),
    )
