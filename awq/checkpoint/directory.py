"""A directory that appears only when it is complete, and the files that travel with a model."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from awq.checkpoint.files import cached_directory
from awq.errors import AwqError, CheckpointError

logger = logging.getLogger("awq.checkpoint")

_WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack",
    ".onnx", ".onnx_data", ".ot", ".mlmodel", ".tflite",
)  # fmt: skip
_FOLDERS_LEFT = {"onnx", "openvino", ".git", ".cache", "__pycache__"}


@contextmanager
def complete_directory(target: str | Path) -> Iterator[Path]:
    """A temporary sibling of `target` that takes its place when the block ends well, and vanishes when it does not.

    When `target` exists, files written anew replace its own, weights of an earlier model are removed, and everything else in
    it stays. Raises CheckpointError when the file system refuses (no space, no permission); `target` is then as it was.
    """
    target = Path(target).resolve()
    work = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"cannot save to {target}: it is a file; give a directory.")
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"cannot write beside {target}: {error}.") from error
    try:
        yield work
        _open_modes(work)
        _swap(work, target)
    except AwqError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"saving to {target} failed and was undone: {error}.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _swap(work: Path, target: Path) -> None:
    if not target.exists():
        work.rename(target)
        return
    old = work.with_suffix(".old")
    target.rename(old)
    try:
        work.rename(target)
    except OSError:
        old.rename(target)
        raise
    _keep_rest(old, target)
    shutil.rmtree(old, ignore_errors=True)


def _keep_rest(old: Path, new: Path) -> None:
    """Moves what only the old directory has, except weights of the model that was there."""
    for path in old.iterdir():
        place = new / path.name
        if not place.exists() and not path.name.endswith(_WEIGHTS):
            path.rename(place)
        elif path.is_dir() and place.is_dir():
            _keep_rest(path, place)


def _open_modes(work: Path) -> None:
    """Gives files the permissions the user's umask allows: safetensors writes them readable by their owner alone."""
    allowed = work.stat().st_mode & 0o666
    for path in work.glob("*.safetensors"):
        path.chmod(allowed)


def source_directory(source: str | Path | None) -> Path | None:
    """Local directory of a model given by path or hub id (its cached snapshot), or None."""
    if source is None or Path(source).is_dir():
        return None if source is None else Path(source)
    try:
        from huggingface_hub import snapshot_download

        folders = [f"{folder}/*" for folder in _FOLDERS_LEFT]
        root = Path(snapshot_download(str(source), ignore_patterns=[f"*{ending}" for ending in _WEIGHTS] + folders))
        # A pattern of the hub's client matches in folders too: those of dense heads, whose weights belong here, come after.
        parts = sorted(_module_folders(root) - _FOLDERS_LEFT)
        return Path(snapshot_download(str(source), allow_patterns=[f"{part}/*" for part in parts])) if parts else root
    except Exception as error:  # the hub's client has many ways to fail, and none of them may lose a quantized model
        logger.warning("files beside the weights of %s are taken from the cache only: %s", source, str(error).split("\n")[0])
        return cached_directory(str(source))


def copy_companions(source: Path, target: Path) -> None:
    """Copies every file of a model directory but its own weights; files already written are kept.

    Weights in folders that `modules.json` names belong to other parts (dense heads of sentence-transformers) and are copied.
    """
    parts = _module_folders(source)
    for path in sorted(source.iterdir()):
        if path.name in _FOLDERS_LEFT:
            continue
        if path.is_dir():
            left = _FOLDERS_LEFT if path.name in parts else _FOLDERS_LEFT | {f"*{ending}" for ending in _WEIGHTS}
            shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns(*left), dirs_exist_ok=True)
        elif not path.name.endswith(_WEIGHTS) and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def _module_folders(source: Path) -> set[str]:
    try:
        modules = json.loads((source / "modules.json").read_text(encoding="utf-8"))
        return {Path(module["path"]).parts[0] for module in modules if module["path"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
