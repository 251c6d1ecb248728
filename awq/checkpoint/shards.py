"""Weight files that are written one at a time and named when all of them are there.

transformers' save needs a whole model. A model that leaves memory block by block is written as
parts, one file a block. Parts and what a save wrote become the shards of one checkpoint by their
names and an index: no tensor is copied.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from awq.checkpoint.files import INDEX_FILE, SINGLE_FILE, read_header, weight_files
from awq.errors import ConfigError

SHARD_BYTES = 5 * 10**9  # as transformers cuts

_SIZE = re.compile(r"[0-9]+(\.[0-9]+)?[KMGT]B", re.IGNORECASE)


def check_shard_size(size: Any) -> None:
    """Raises ConfigError unless `size` is a number of bytes, or text as "5GB"."""
    number = isinstance(size, int) and not isinstance(size, bool) and size > 0
    if not number and not (isinstance(size, str) and _SIZE.fullmatch(size)):
        raise ConfigError(f'shard_size is {size!r}; use a number of bytes, or text as "5GB".')


@dataclass(frozen=True)
class Parts:
    """A model in parts.

    files: of its blocks; rest: tensors that lie in none of them, by name; names: arguments of
    transformers' save, which say how tensors are called on disk.
    """

    files: Sequence[Path]
    rest: dict[str, Tensor]
    names: dict[str, bool]


def join_shards(body: Path, parts: Sequence[Path], parameters: int) -> None:
    """Makes one checkpoint in `body` of the weight files there and of `parts`.

    parts stay where they are; `body` gets links to them, or copies on another file system.
    parameters: of the whole model.
    """
    written = weight_files(body)
    (body / INDEX_FILE).unlink(missing_ok=True)
    total = len(written) + len(parts)

    weight_map: dict[str, str] = {}
    size = 0
    for number, path in enumerate([*written, *parts], 1):
        name = _shard_name(number, total)
        weight_map |= dict.fromkeys(read_header(path), name)
        size += _bytes_of_tensors(path)

        if path.parent == body:
            path.rename(body / name)
        else:
            _link(path, body / name)

    _write_index(body, weight_map, {"total_parameters": parameters, "total_size": size})


def _shard_name(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def _write_index(body: Path, weight_map: dict[str, str], metadata: dict[str, int]) -> None:
    index = {"metadata": metadata, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (body / INDEX_FILE).write_text(text, encoding="utf-8")


def _bytes_of_tensors(path: Path) -> int:
    """What follows the header of a safetensors file, whose length is its first number."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


def _link(path: Path, place: Path) -> None:
    try:
        os.link(path, place)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(path, place)


class ShardWriter:
    """Takes tensors in any order and writes them as one `model.safetensors`, or as shards with an
    index.

    folder: an existing folder. limit: bytes of a shard; one shard at a time is in memory. Nothing
    has its name before `close`.
    """

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.limit = limit
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Tensors that belong into one shard, by name."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._pending and self._pending_bytes + size > self.limit:
            self._flush()
        self._pending |= tensors
        self._pending_bytes += size
        self._total_bytes += size

    def close(self) -> None:
        """Writes what is left and gives the shards their names."""
        self._flush()
        if len(self._shards) == 1:
            self._shards[0][0].rename(self.folder / SINGLE_FILE)
            return

        weight_map: dict[str, str] = {}
        for number, (path, tensors) in enumerate(self._shards, 1):
            name = _shard_name(number, len(self._shards))
            path.rename(self.folder / name)
            weight_map |= dict.fromkeys(tensors, name)

        _write_index(self.folder, weight_map, {"total_size": self._total_bytes})

    def _flush(self) -> None:
        if not self._pending:
            return

        path = self.folder / f"part-{len(self._shards)}.safetensors"
        save_file(self._pending, path, metadata={"format": "pt"})
        self._shards.append((path, list(self._pending)))
        self._pending = {}
        self._pending_bytes = 0
