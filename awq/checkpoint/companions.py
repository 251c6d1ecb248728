"""The files beside a model's weights: found for a path or hub id, and carried into the directory of
the quantized model.

A source is someone else's directory. Only regular files that really lie in it are copied (or in the
hub cache's store of blobs, where snapshots keep their files): a link may lead anywhere, in circles,
or to nothing. What cannot be read is left out with a warning, since it must not cost the weights
that took hours to compute.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from awq.checkpoint.files import cached_directory
from awq.errors import first_line

logger = logging.getLogger("awq.checkpoint")

WEIGHT_ENDINGS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".mlmodel",
    ".tflite",
)
FOLDERS_LEFT_OUT = {"onnx", "openvino", ".git", ".cache", "__pycache__"}
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def source_directory(source: str | Path | None) -> Path | None:
    """Local directory of a model given by path or hub id (its cached snapshot), or None."""
    if source is None or Path(source).is_dir():
        return None if source is None else Path(source)
    try:
        from huggingface_hub import snapshot_download

        folders = [f"{folder}/*" for folder in FOLDERS_LEFT_OUT]
        root = Path(
            snapshot_download(
                str(source), ignore_patterns=[f"*{ending}" for ending in WEIGHT_ENDINGS] + folders
            )
        )

        # A pattern of the hub's client matches in folders too: those of dense heads, whose weights
        # belong here, come after.
        parts = sorted(module_folders(root) - FOLDERS_LEFT_OUT)
        if parts:
            return Path(
                snapshot_download(str(source), allow_patterns=[f"{part}/*" for part in parts])
            )
        return root
    # the hub's client has many ways to fail, and none of them may lose a quantized model
    except Exception as error:
        logger.warning(
            "files beside the weights of %s are taken from the cache only: %s",
            source,
            first_line(error),
        )
        return cached_directory(str(source))


def copy_companions(source: Path, target: Path) -> None:
    """Copies every file of a model directory but its own weights; files already written are kept.

    Weights in folders that `modules.json` names belong to other parts (dense heads of
    sentence-transformers) and are copied; the first of these folders may be the transformer's own
    (`0_Transformer`), whose weights are written anew.
    """
    parts = module_folders(source)
    own = {folder for folder in parts if folder.endswith("Transformer")}

    def is_companion(inner: Path) -> bool:
        heads = len(inner.parts) > 1 and inner.parts[0] in parts - own
        return heads or not inner.name.endswith(WEIGHT_ENDINGS)

    copy_files(source, target, is_companion)


def copy_files(source: Path, target: Path, wanted: Callable[[Path], bool]) -> None:
    """Copies the files of a directory whose relative path is `wanted`; files already written are
    kept."""
    skipped: list[str] = []
    for path in companion_files(source, skipped):
        inner = path.relative_to(source)
        place = target / inner
        if not wanted(inner) or place.exists():
            continue
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise
            skipped.append(str(inner))

    if skipped:
        logger.warning(
            "%s: left out, for they cannot be read or lie elsewhere: %s",
            source,
            ", ".join(sorted(skipped)[:5]),
        )


def companion_files(source: Path, skipped: list[str]) -> Iterator[Path]:
    """Regular files that really lie in a directory, sorted; each folder once. Others' names are
    added to `skipped`."""
    root = Path(os.path.realpath(source))
    # the hub's cache: snapshots/<revision> links into blobs
    homes = [root, root.parent.parent / "blobs"]
    seen = {root}
    for folder, folders, files in os.walk(source, followlinks=True):
        here = Path(folder)
        kept = []
        for name in sorted(folders):
            real = Path(os.path.realpath(here / name))
            if name in FOLDERS_LEFT_OUT or real in seen or is_temporary(name):
                continue
            if not real.is_relative_to(root):
                skipped.append(str((here / name).relative_to(source)))
                continue

            seen.add(real)
            kept.append(name)

        folders[:] = kept
        for name in sorted(files):
            path = here / name
            real = Path(os.path.realpath(path))  # `Path.resolve` raises for links in circles
            inside = any(real.is_relative_to(home) for home in homes)
            if inside and real.is_file() and os.access(real, os.R_OK):
                yield path
            else:
                skipped.append(str(path.relative_to(source)))


def is_temporary(name: str) -> bool:
    """Whether a name is that of an unfinished save's folder."""
    return name.startswith(".") and name.endswith((".awq-tmp", ".awq-old"))


def module_folders(source: Path) -> set[str]:
    try:
        modules = json.loads((source / "modules.json").read_text(encoding="utf-8"))
        return {Path(module["path"]).parts[0] for module in modules if module["path"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
