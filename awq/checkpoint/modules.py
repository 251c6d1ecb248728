"""`modules.json` of sentence-transformers: which parts a model has, and in which folders they lie.

Releases before 2.0 put the transformer into a folder `0_Transformer`. `read_modules` is the only
reader of that file: a list of modules whose folders lie inside the directory. Nothing here imports
torch, since `awq info` asks too.
"""

from __future__ import annotations

import os
from pathlib import Path

from awq.checkpoint.files import read_any_json, read_json
from awq.errors import CheckpointError


def read_modules(root: Path) -> tuple[tuple[str, Path], ...]:
    """(kind, folder) of every module in `modules.json`, the transformer first; empty without that
    file.

    A kind of sentence-transformers is one name ("Pooling"); code of somebody else's keeps its whole
    one ("custom.Pooling"), since it may compute anything. Raises CheckpointError unless it is a
    list of modules with different folders inside `root`.
    """
    path = root / "modules.json"
    if not path.exists():
        return ()

    listed = read_any_json(path)
    if not isinstance(listed, list) or not listed:
        raise CheckpointError(
            f"{path} is not a list of sentence-transformers modules; copy it from the original "
            "model."
        )

    modules = []
    for entry in listed:
        kind, part = (
            (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        )
        if not isinstance(kind, str) or not isinstance(part, str):
            raise CheckpointError(
                f"{path}: {entry!r} is not a module with a type and a path; copy the original file."
            )

        if "\0" in part:
            raise CheckpointError(f"{path}: path {part!r} names no folder; copy the original file.")

        folder = root / part
        if Path(part).is_absolute() or not _real(folder).is_relative_to(_real(root)):
            raise CheckpointError(
                f"{path}: path {part!r} leads outside the directory; the checkpoint is refused."
            )

        own = kind.startswith("sentence_transformers.")
        modules.append((kind.rpartition(".")[2] if own else kind, folder))

    folders = [_real(folder) for _, folder in modules]
    if len(set(folders)) < len(folders):
        raise CheckpointError(f"{path} gives two modules the same path; copy the original file.")
    return tuple(modules)


def body_directory(root: Path) -> Path:
    """The folder of the transformer: `root` itself, or what the first module of `modules.json`
    says."""
    if (root / "config.json").exists():
        return root
    modules = read_modules(root)
    return modules[0][1] if modules else root


def is_embedder(root: Path) -> bool:
    """Whether a local directory is sentence-transformers' of a model for embeddings, not of a
    cross-encoder with its head."""
    settings = root / "config_sentence_transformers.json"
    kind = read_json(settings).get("model_type") if settings.is_file() else None
    modules = read_modules(root)
    # A sparse encoder's transformer is a masked language model, whose head it needs.
    return bool(modules) and modules[0][0] != "MLMTransformer" and kind != "CrossEncoder"


def _real(path: Path) -> Path:
    """The path without links; of links that go in circles, what is left of it (`Path.resolve`
    raises there)."""
    return Path(os.path.realpath(path))
