"""Looking into checkpoint files without loading them: safetensors headers, sizes and names."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path

from awq.errors import CheckpointError


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files at the top of a local directory, sorted; empty when it is no directory."""
    root = Path(directory)
    return sorted(root.glob("*.safetensors")) if str(directory) and root.is_dir() else []


def read_header(path: Path) -> dict[str, dict]:
    """Tensor name → {dtype, shape, data_offsets} of one safetensors file.

    Raises CheckpointError when the file is truncated or is no safetensors file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > size:
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
    except (struct.error, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}); download or save it again.") from error
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < end:
        raise CheckpointError(f"{path} is truncated: {size} bytes of {end}; download or save it again.")
    return header


def packed_names(files: Iterable[Path]) -> set[str]:
    """Names of modules whose `qweight` is in the files."""
    return {name.removesuffix(".qweight") for file in files for name in read_header(file) if name.endswith(".qweight")}


def check_directory(path: str | Path) -> None:
    """Raises CheckpointError when a local model directory has no config, no safetensors weights, or broken ones."""
    root = Path(path)
    if not (root / "config.json").is_file():
        raise CheckpointError(f"{root} has no config.json; it is not a model directory.")
    files = weight_files(root)
    if not files:
        raise CheckpointError(f"{root} has no .safetensors weights; convert the model to safetensors first.")
    for file in files:
        read_header(file)
    index = root / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(named - {f.name for f in files})
        if missing:
            raise CheckpointError(f"{root} lacks {', '.join(missing)}, named in {index.name}.")
