"""Converting a saved checkpoint between the packed versions, file by file and exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from awq.checkpoint.account import is_finite
from awq.checkpoint.companions import copy_files
from awq.checkpoint.directory import complete_directory
from awq.checkpoint.files import (
    INDEX_FILE,
    PackedTensors,
    check_complete,
    read_json,
    weight_files,
)
from awq.checkpoint.match import fits_dtype
from awq.checkpoint.modules import body_directory
from awq.checkpoint.source import Source
from awq.config import PACKED_TENSORS, AwqConfig, normalize_format
from awq.core.weight import QuantizedWeight
from awq.errors import CheckpointError, ConfigError
from awq.formats import get_format
from awq.formats.gemv_fast import zeros_are_whole


def convert_checkpoint(source: str | Path, target: str | Path, version: str) -> int:
    """Rewrites the checkpoint in `source` as `version` ("gemm", "gemv", "gemv_fast") into `target`.

    One weight file is in memory at a time. Returns the number of converted linears. Raises
    CheckpointError for a broken or unquantized source, ConfigError for a version that cannot hold a
    linear's shape; `target` is then untouched.

    >>> convert_checkpoint("my-model-awq", "my-model-gemv", "gemv")
    21
    """
    version = normalize_format(version)
    opened = Source.open_directory(source)
    root = Path(source)
    config, packed = opened.settings, opened.packed
    if not packed:
        raise CheckpointError(f"{root} holds no packed weights (no tensor named qweight).")
    inner = body_directory(root).relative_to(root)
    weights = {file.name for file in weight_files(root / inner)} | {INDEX_FILE}
    with complete_directory(target, root) as work:
        copy_files(root, work, lambda file: file.parent != inner or file.name not in weights)
        _write_weights(root / inner, work / inner, packed, config, version)
        settings = read_json(work / inner / "config.json")
        settings["quantization_config"] = config.with_(format=version).to_transformers_dict()
        (work / inner / "config.json").write_text(
            json.dumps(settings, indent=2) + "\n", encoding="utf-8"
        )
        card = work / "README.md"
        if card.is_file():
            old, new = (f"version `{name}`".encode() for name in (config.format, version))
            # bytes: what a stranger wrote need not be UTF-8
            card.write_bytes(card.read_bytes().replace(old, new))
    return len(packed)


def _write_weights(
    source: Path, work: Path, packed: PackedTensors, config: AwqConfig, version: str
) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for path in weight_files(source):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            tensors = {
                n: file.get_tensor(n)
                for n in names
                if n.rpartition(".")[2] not in PACKED_TENSORS or n.rpartition(".")[0] not in packed
            }
            metadata = file.metadata() or {"format": "pt"}
        # A linear is written whole into the file that holds its qweight: shards cut between any two
        # tensors.
        for name in (n.removesuffix(".qweight") for n in names if n.endswith(".qweight")):
            tensors |= _converted(name, packed[name], config, version)
        if not tensors:
            continue
        save_file(tensors, work / path.name, metadata=metadata)
        weight_map |= dict.fromkeys(tensors, path.name)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    if (source / "model.safetensors.index.json").is_file():
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (work / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=1) + "\n", encoding="utf-8"
        )


def _converted(
    name: str, entries: dict[str, dict[str, Any]], config: AwqConfig, version: str
) -> dict[str, Tensor]:
    """The three tensors of one linear in the new layout."""
    weight = read_packed(name, entries, config)
    try:
        return {
            f"{name}.{kind}": t.contiguous() for kind, t in get_format(version).pack(weight).items()
        }
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def read_packed(
    name: str, entries: dict[str, dict[str, Any]], config: AwqConfig
) -> QuantizedWeight:
    """The weight of one packed linear of a checkpoint; entries: its part of `Source.packed`.

    Raises CheckpointError when its tensors are missing, broken, or of other shapes than the config
    says.
    """
    check_complete(name, entries)
    parts = {}
    for kind in PACKED_TENSORS:
        with safe_open(entries[kind]["file"], "pt") as file:
            parts[kind] = file.get_tensor(f"{name}.{kind}")
    if parts["qweight"].dim() != 2:
        raise CheckpointError(
            f"{name}: qweight has shape {list(parts['qweight'].shape)}, not two axes."
        )
    packed_format = get_format(config.format)
    in_features, out_features = packed_format.features_of(parts["qweight"])
    size = config.group_size_of(in_features, name)
    shapes = packed_format.shapes(in_features, out_features, size)
    wrong = [kind for kind in PACKED_TENSORS if tuple(parts[kind].shape) != shapes[kind][0]]
    strange = [
        kind for kind in PACKED_TENSORS if not fits_dtype(entries[kind]["dtype"], shapes[kind][1])
    ]
    if strange:
        raise CheckpointError(
            f"{name}: {strange[0]} has dtype {entries[strange[0]]['dtype']}; the checkpoint is "
            "broken."
        )
    if not is_finite(parts["scales"]):
        raise CheckpointError(
            f"{name}: scales hold numbers that are not finite; download the checkpoint again."
        )
    if wrong:
        raise CheckpointError(
            f"{name}: {wrong[0]} has shape {list(parts[wrong[0]].shape)}, not "
            f"{list(shapes[wrong[0]][0])} as version "
            f"{config.format} with group_size {config.group_size} would have; correct "
            "quantization_config in config.json."
        )
    if config.format == "gemv_fast" and not zeros_are_whole(parts["scales"], parts["qzeros"]):
        raise CheckpointError(
            f"{name}: qzeros are no whole multiples of scales; download the checkpoint again."
        )
    try:
        return packed_format.unpack(parts, in_features, out_features, size)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
