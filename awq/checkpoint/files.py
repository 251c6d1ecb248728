"""Looking into checkpoint files without loading them: names, dtypes and shapes of tensors, sizes,
JSON.

Files come from strangers. A pipe would hang the reader, a header may claim gigabytes, JSON may nest
without end: only regular files are opened, sizes are compared with a bound before anything is
allocated, and whatever the parsers raise becomes a `CheckpointError` with the file's name.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from awq.checkpoint.sizes import check_counts
from awq.config import PACKED_TENSORS, stored_dtypes
from awq.errors import CheckpointError

PackedTensors = dict[str, dict[str, dict[str, Any]]]
"""Module name → "qweight" | "qzeros" | "scales" → {dtype, shape, file}."""

FLOATS = ("F16", "BF16", "F32")
# of safetensors' files → of torch
DTYPE_NAMES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
}
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
REPORT_FILE = "quantization_report.json"
MAX_HEADER_BYTES = 100 << 20  # safetensors' own bound
MAX_JSON_BYTES = 64 << 20  # the index of the largest models has 10 MB


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files that make up the model of a local directory, in the order of their
    names.

    As transformers chooses: `model.safetensors`, else the shards that the index names, else
    whatever lies there. Empty when it is no directory.
    """
    root = Path(directory)
    if not str(directory) or not root.is_dir():
        return []
    if (root / SINGLE_FILE).exists():
        return [root / SINGLE_FILE]
    if (root / INDEX_FILE).is_file():
        return [root / name for name in shards_of(root / INDEX_FILE) if (root / name).exists()]
    return sorted(root.glob("*.safetensors"))


def shards_of(index: Path) -> list[str]:
    """Names of the files that an index speaks of. Raises CheckpointError when one of them lies
    outside its folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise CheckpointError(
            f"{index} has no weight_map of tensor names to file names; save the checkpoint again."
        )

    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(
            f"{index} names {outside[0]!r}, which is no file of its own folder; the checkpoint is "
            "refused."
        )
    return names


def files_of(config: Any, given: Iterable[str] | None = None) -> list[Path]:
    """The safetensors files a model is loaded from: as told by transformers, or where its config
    came from.

    A hub model's files are looked up in the local cache; nothing is downloaded. Empty when they are
    not found.
    """
    if given:
        return [Path(f) for f in given if str(f).endswith(".safetensors")]

    name = getattr(config, "_name_or_path", "") or ""
    files = weight_files(name)
    if not files and name and not Path(name).exists():
        files = weight_files(cached_directory(name, getattr(config, "_commit_hash", None)) or "")

    return files


def cached_directory(repository: str, revision: str | None = None) -> Path | None:
    """The local cache's snapshot of a hub model, or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(repository, "config.json", revision=revision)
    except HFValidationError:
        return None

    return Path(config).parent if isinstance(config, str) else None


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name → {dtype, shape, file} of one safetensors file; dtype in the file's words ("F16",
    "I32").

    A file that did not change is read once. Raises CheckpointError when it is no regular file,
    truncated, or no safetensors.
    """
    status = _regular(path)
    return dict(_read_header(path, status.st_size, status.st_mtime_ns, status.st_ino))


def spans_of(path: Path, names: Collection[str]) -> list[tuple[int, int]]:
    """[start, stop) of bytes where some tensors lie in a safetensors file. Names that it does not
    hold are passed by."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))

    first = 8 + length  # byte of the tensors
    spans = []
    for name in names:
        if name in header:
            start, stop = header[name]["data_offsets"]
            spans.append((first + start, first + stop))

    return spans


@lru_cache(maxsize=256)
def _read_header(path: Path, size: int, _changed: int, _inode: int) -> dict[str, dict[str, Any]]:
    _check_header_size(path, size)
    try:
        with safe_open(path, "numpy") as file:  # which loads no torch; no tensor is read
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: {"dtype": part.get_dtype(), "shape": list(part.get_shape()), "file": path}
                for name, part in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        if "not fully covered" in str(error) or "incomplete metadata" in str(error).lower():
            raise CheckpointError(
                f"{path} is truncated (it has {size} bytes); download or save it again."
            ) from error
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}); download or save it again."
        ) from error


def _check_header_size(path: Path, size: int) -> None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path} is not a readable safetensors file (a header of {length} bytes in a file of "
            f"{size}); "
            "download or save it again."
        )


def tensor_headers(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Headers of all tensors of all files. Raises CheckpointError when two files hold a tensor of
    one name."""
    headers: dict[str, dict[str, Any]] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in headers:
                raise CheckpointError(
                    f"{name} lies in {headers[name]['file'].name} and in {file.name}; remove the "
                    "older file."
                )
            headers[name] = entry
    return headers


def packed_among(headers: dict[str, dict[str, Any]]) -> PackedTensors:
    """The packed linears among tensor headers, also those that lack a tensor: zeros belong to
    nothing else, while scales may be an activation's."""
    modules: PackedTensors = {}
    for name, entry in headers.items():
        module, _, kind = name.rpartition(".")
        if kind in PACKED_TENSORS:
            modules.setdefault(module, {})[kind] = entry

    return {
        module: tensors
        for module, tensors in modules.items()
        if {"qweight", "qzeros"} & tensors.keys()
    }


def check_complete(name: str, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses a packed linear that lacks one of its tensors, or whose scaled zeros are in another
    dtype than the scales: both come from one computation."""
    missing = [kind for kind in PACKED_TENSORS if kind not in tensors]
    if missing:
        raise CheckpointError(
            f"{name}: the checkpoint lacks {', '.join(missing)}; the file is incomplete, save it "
            "again."
        )

    zeros = tensors["qzeros"]["dtype"]
    scales = tensors["scales"]["dtype"]
    if zeros in FLOATS and zeros != scales:
        raise CheckpointError(
            f"{name}: qzeros have dtype {zeros} and scales {scales}; the file is broken."
        )


def check_packed(packed: PackedTensors) -> None:
    """Refuses packed linears that lack one of their tensors, or whose tensors have dtypes that none
    of the formats has."""
    stored = stored_dtypes()
    known_words = {word for word, name in DTYPE_NAMES.items() if name in stored} | set(FLOATS)
    for name, tensors in packed.items():
        check_complete(name, tensors)
        strange = [kind for kind in PACKED_TENSORS if tensors[kind]["dtype"] not in known_words]
        if strange:
            dtype = tensors[strange[0]]["dtype"]
            raise CheckpointError(
                f"{name}: {strange[0]} has dtype {dtype}, which is in none of the formats; the "
                "file is broken."
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is missing, too large, or no
    object."""
    content = read_any_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content


def first_architecture(named: Any) -> str:
    """The class that a config's `architectures` names first; "" when it names none."""
    first = named[0] if isinstance(named, (list, tuple)) and named else ""
    return first if isinstance(first, str) else ""


def read_any_json(path: Path) -> Any:
    """What a JSON file holds. Raises CheckpointError when it is missing, too large, or no JSON."""
    size = _regular(path).st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path} has {size} bytes, more than the {MAX_JSON_BYTES} that a settings file may "
            "have."
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is missing or not readable as JSON: {error}.") from error


def _constant(name: str) -> float:
    """Infinity may be meant (Mamba's limits of a time step), a number that is none may not."""
    if name == "NaN":
        raise ValueError("it holds NaN where a number belongs")
    return float(name)


def _regular(path: Path) -> os.stat_result:
    """The status of a regular file; opening a pipe or a device would hang. Raises
    CheckpointError."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error

    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file; it is not read.")
    return status


def check_directory(path: str | Path) -> None:
    """Raises CheckpointError when a local model directory lacks its config or weights, or when they
    are broken.

    Packed weights ask for a `quantization_config`: without one, every reader would load random
    numbers in their place.
    """
    root = Path(path)
    if not (root / "config.json").exists():
        raise CheckpointError(f"{root} has no config.json; it is not a model directory.")

    config = read_json(root / "config.json")
    files = weight_files(root)
    if (root / INDEX_FILE).exists():
        _check_index(root, {file.name for file in files})
    if not files:
        raise CheckpointError(
            f"{root} has no .safetensors weights; convert the model to safetensors first."
        )

    headers = tensor_headers(files)
    check_counts(root / "config.json", config, headers)
    packed = packed_among(headers)
    check_packed(packed)
    if packed and not config.get("quantization_config"):
        raise CheckpointError(
            f"{root} holds packed weights (first: {min(packed)}.qweight), but its config.json has "
            "no quantization_config; "
            'add {"quant_method": "awq", "bits": 4, "group_size": …, "version": …} as the '
            "checkpoint was made."
        )


def _check_index(root: Path, files: set[str]) -> None:
    index = root / INDEX_FILE
    named = set(shards_of(index))
    present = {file.name for file in root.glob("model*.safetensors")}
    missing = sorted(named - present - files)
    if missing:
        raise CheckpointError(f"{root} lacks {', '.join(missing)}, named in {index.name}.")

    stray = sorted(present - named)
    if stray:
        raise CheckpointError(
            f"{root} holds {', '.join(stray)}, which {index.name} does not name; remove what is "
            "stale."
        )

    weight_map = read_json(index)["weight_map"]
    for file in sorted(named):
        header = read_header(root / file)
        absent = [
            name for name, shard in weight_map.items() if shard == file and name not in header
        ]
        if absent:
            raise CheckpointError(
                f"{root / file} lacks {absent[0]}, which {index.name} looks for there."
            )
