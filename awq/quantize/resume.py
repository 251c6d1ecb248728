"""What a quantization keeps between two blocks, so that another run can go on from there and give
the same bytes.

Folded norms are float32 while a block is visited and have the model's dtype on disk, so hidden
states cannot be computed again from finished blocks exactly. They are kept as they are.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from awq.folds import Fold, InputGroup
from awq.nn.presence import Progress
from awq.nn.walk import BlockWalk
from awq.quantize.experts import ExpertTokens
from awq.quantize.report import LinearReport

if TYPE_CHECKING:
    from awq.quantize.run import QuantizeRun

_ORIGINAL = "original"
_WITHOUT_EFFECT = ("progress", "preset")  # on the result; a preset stands for options that have


def settings_of(run: QuantizeRun) -> dict[str, Any]:
    """All that decides about the result beside the model, by the name a person knows it by."""
    from awq import __version__

    options = {k: v for k, v in asdict(run.options).items() if k not in _WITHOUT_EFFECT}
    versions = {f"version of {name}": version for name, version in run.report.versions.items()}

    return {
        "version of autoawq": __version__,
        **versions,
        **{f"option {name}": value for name, value in options.items()},
        **{f"setting {name}": value for name, value in run.config.to_dict().items()},
        "kind of device": run.device.type,
        "calibration text": _hash_of_batches(run),
    }


def _hash_of_batches(run: QuantizeRun) -> str:
    digest = hashlib.sha256()
    for batch in run.batches:
        for name, tensor in sorted(batch.model_inputs().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def progress_of(run: QuantizeRun, walk: BlockWalk) -> Progress:
    """The state behind the block whose visit has just ended."""
    report = run.report
    hidden = dict(walk.hidden)
    if run.original_hidden is not None:
        hidden[_ORIGINAL] = run.original_hidden

    notes = {
        "linears": [asdict(line) for line in report.linears],
        "warnings": report.warnings,
        "experts": {name: asdict(tokens) for name, tokens in report.experts.items()},
        "phases": report.phases,
        "taken": run.taken(),
        "folds": [[shape, _groups_to_json(found)] for shape, found in run.known_folds.items()],
    }
    return Progress(walk.finished, hidden, [line.name for line in report.linears], notes)


def restore_progress(run: QuantizeRun, progress: Progress) -> None:
    """The inverse, into a run that has just started."""
    report = run.report
    notes = progress.notes
    original = progress.hidden.get(_ORIGINAL)
    if original is not None:
        run.original_hidden = run.kept_hidden(original)

    report.linears = [_line_from_json(line) for line in notes["linears"]]
    report.warnings[:] = notes["warnings"]
    report.phases = notes["phases"]
    run.taken_before = notes.get("taken", {})
    for name, tokens in notes["experts"].items():
        report.experts[name] = ExpertTokens(**tokens)
    for shape, groups in notes["folds"]:
        run.known_folds[_structure(shape)] = [_group_from_json(group) for group in groups]


def _structure(shape: list[Any]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of a block's parameters, as a key."""
    return tuple((name, tuple(sizes)) for name, sizes in shape)


def _line_from_json(line: dict[str, Any]) -> LinearReport:
    rows, columns = line["shape"]
    return LinearReport(**{**line, "shape": (rows, columns)})


def _groups_to_json(groups: list[InputGroup]) -> list[dict[str, Any]]:
    found = []
    for group in groups:
        entry = {"consumers": group.consumers, "in_features": group.in_features}
        fold = group.fold
        if fold is not None:
            rows = None if fold.rows is None else fold.rows.tolist()
            parts = (fold.consumers, fold.producer, fold.kind, rows)
            entry["fold"] = dict(zip(("consumers", "producer", "kind", "rows"), parts))

        found.append({**entry, "reason": group.reason})
    return found


def _group_from_json(entry: dict[str, Any]) -> InputGroup:
    fold = entry.get("fold")
    if fold is not None:
        rows = None if fold["rows"] is None else torch.tensor(fold["rows"])
        fold = Fold(tuple(fold["consumers"]), fold["producer"], fold["kind"], rows)
    return InputGroup(tuple(entry["consumers"]), entry["in_features"], fold, entry["reason"])
