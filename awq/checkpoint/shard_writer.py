"""Weight files written tensor by tensor, none larger than a limit."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from awq.checkpoint.files import INDEX_FILE, SINGLE_FILE

SHARD_BYTES = 5 * 10**9  # as transformers cuts


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
            name = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            path.rename(self.folder / name)
            weight_map |= dict.fromkeys(tensors, name)
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        text = json.dumps(index, indent=1) + "\n"
        (self.folder / INDEX_FILE).write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self.folder / f"part-{len(self._shards)}.safetensors"
        save_file(self._pending, path, metadata={"format": "pt"})
        self._shards.append((path, list(self._pending)))
        self._pending = {}
        self._pending_bytes = 0
