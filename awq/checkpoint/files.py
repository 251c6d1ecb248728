"""Looking into checkpoint files without loading them: safetensors headers, sizes and names."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from awq.errors import CheckpointError

PackedTensors = dict[str, dict[str, dict[str, Any]]]
"""Module name → "qweight" | "qzeros" | "scales" → {dtype, shape, data_offsets, file}."""

_ITEM_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
}
PACKED_KINDS = ("qweight", "qzeros", "scales")


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files at the top of a local directory, sorted; empty when it is no directory."""
    root = Path(directory)
    return sorted(root.glob("*.safetensors")) if str(directory) and root.is_dir() else []


def files_of(config: Any, given: Iterable[str] | None = None) -> list[Path]:
    """The safetensors files a model is loaded from: as told by transformers, or where its config came from.

    A hub model's files are looked up in the local cache; nothing is downloaded. Empty when they are not found.
    """
    if given:
        return [Path(f) for f in given if str(f).endswith(".safetensors")]
    name = getattr(config, "_name_or_path", "") or ""
    found = weight_files(name)
    if not found and name and not Path(name).exists():
        found = weight_files(cached_directory(name, getattr(config, "_commit_hash", None)) or "")
    return found


def cached_directory(repository: str, revision: str | None = None) -> Path | None:
    """The local cache's snapshot of a hub model, or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(repository, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def read_header(path: Path) -> dict[str, dict]:
    """Tensor name → {dtype, shape, data_offsets} of one safetensors file.

    Raises CheckpointError when the file is truncated or is no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > size:
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        for name, entry in header.items():
            bits = _ITEM_BITS.get(entry["dtype"])
            start, stop = entry["data_offsets"]
            if bits and math.prod(entry["shape"]) * bits != (stop - start) * 8:
                raise ValueError(f"{name} of shape {entry['shape']} in {stop - start} bytes")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}); download or save it again.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if size < end:
        raise CheckpointError(f"{path} is truncated: {size} bytes of {end}; download or save it again.")
    return header


def packed_tensors(files: Iterable[Path]) -> PackedTensors:
    """Headers of all packed linears in the files: every module that has a `qweight`."""
    found: PackedTensors = {}
    for file in files:
        for name, entry in read_header(file).items():
            module, _, kind = name.rpartition(".")
            if kind in PACKED_KINDS:
                found.setdefault(module, {})[kind] = {**entry, "file": file}
    return {module: tensors for module, tensors in found.items() if "qweight" in tensors}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or not readable as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content


def check_directory(path: str | Path) -> None:
    """Raises CheckpointError when a local model directory has no config, no safetensors weights, or broken ones."""
    root = Path(path)
    if not (root / "config.json").is_file():
        raise CheckpointError(f"{root} has no config.json; it is not a model directory.")
    read_json(root / "config.json")
    files = weight_files(root)
    if not files:
        raise CheckpointError(f"{root} has no .safetensors weights; convert the model to safetensors first.")
    index = root / "model.safetensors.index.json"
    if index.is_file():
        named = set(read_json(index).get("weight_map", {}).values())
        missing = sorted(named - {f.name for f in files})
        if missing:
            raise CheckpointError(f"{root} lacks {', '.join(missing)}, named in {index.name}.")
    for file in files:
        read_header(file)
