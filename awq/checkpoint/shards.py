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

from torch import Tensor

from awq.checkpoint.files import INDEX_FILE, read_header, weight_files
from awq.errors import ConfigError

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
        name = f"model-{number:05d}-of-{total:05d}.safetensors"
        weight_map |= dict.fromkeys(read_header(path), name)
        size += _bytes_of_tensors(path)
        if path.parent == body:
            path.rename(body / name)
        else:
            _link(path, body / name)
    index = {
        "metadata": {"total_parameters": parameters, "total_size": size},
        "weight_map": weight_map,
    }
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
