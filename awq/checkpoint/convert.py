"""Converting a saved checkpoint into another layout, linear by linear and without a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from awq.checkpoint import compressed_tensors
from awq.checkpoint.card import rewrite_card
from awq.checkpoint.companions import copy_files
from awq.checkpoint.directory import complete_directory
from awq.checkpoint.files import INDEX_FILE, read_json, weight_files
from awq.checkpoint.packed import PackedCheckpoint
from awq.checkpoint.shards import ShardWriter
from awq.config import COMPRESSED_TENSORS, DENSE, FORMATS, normalize_format
from awq.core.weight import QuantizedWeight
from awq.errors import ConfigError
from awq.formats import get_format

LAYOUTS = (*FORMATS, COMPRESSED_TENSORS, DENSE)


@dataclass(frozen=True)
class _Layout:
    """How one linear is written, and what config.json says of all (None: it is an ordinary
    model)."""

    tensors: Callable[[str, QuantizedWeight], dict[str, Tensor]]
    settings: dict[str, Any] | None


def convert_checkpoint(source: str | Path, target: str | Path, version: str) -> int:
    """Rewrites the checkpoint in `source` as `version` into `target`.

    version: "gemm", "gemv" or "gemv_fast"; "compressed-tensors", the files of llm-compressor;
    "dense", ordinary weights with the quantized values, in the model's dtype. All but "dense" keep
    every code, zero and scale. `source` may be in any of these but "dense".

    At most one shard of 5 GB is in memory. Returns the number of converted linears. Raises
    CheckpointError for a broken or unquantized source, ConfigError for a version that cannot hold a
    linear's shape; `target` is then untouched.

    >>> convert_checkpoint("my-model-awq", "my-model-gemv", "gemv")
    21
    """
    name = layout_name(version)
    opened = PackedCheckpoint.open(source)
    layout = _layout(name, opened)
    root = Path(source)
    inner = opened.body.relative_to(root)
    weights = {file.name for file in weight_files(opened.body)} | {INDEX_FILE}

    with complete_directory(target, root) as work:
        copy_files(root, work, lambda file: file.parent != inner or file.name not in weights)
        _write_weights(opened, layout, work / inner)
        _write_settings(work / inner / "config.json", layout.settings)
        rewrite_card(work, opened.config, opened.layout, name)

    return len(opened.linears)


def layout_name(version: str) -> str:
    """Canonical name of a layout: "GEMM" → "gemm". Raises ConfigError for one that is not in
    `LAYOUTS`."""
    plain = str(getattr(version, "value", version)).lower().replace("_", "-")
    if plain in (COMPRESSED_TENSORS, DENSE):
        return plain
    try:
        return normalize_format(version)
    except ConfigError as error:
        raise ConfigError(
            f"version {version!r} is unknown; use one of {', '.join(LAYOUTS)}."
        ) from error


def _layout(name: str, opened: PackedCheckpoint) -> _Layout:
    dtype = _model_dtype(opened)
    if name == DENSE:
        return _Layout(lambda linear, w: {f"{linear}.weight": w.dequantize(dtype)}, None)
    if name == COMPRESSED_TENSORS:
        settings = compressed_tensors.write_settings(opened.config, opened.dense())
        return _Layout(lambda linear, w: compressed_tensors.pack(linear, w, dtype), settings)

    packed_format = get_format(name)

    def tensors(linear: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        try:
            parts = packed_format.pack(weight)
        except ConfigError as error:
            raise ConfigError(f"{linear}: {error}") from error
        return {f"{linear}.{kind}": part.contiguous() for kind, part in parts.items()}

    return _Layout(tensors, opened.config.with_(format=name).to_transformers_dict())


def _model_dtype(opened: PackedCheckpoint) -> torch.dtype:
    """The dtype that the config gives the model; float32, which rounds nothing, where it gives
    none."""
    config = opened.source.config
    text = config.get_text_config()
    found = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    found = found or getattr(config, "torch_dtype", None)
    if isinstance(found, str):
        found = getattr(torch, found, None)

    return found if isinstance(found, torch.dtype) else torch.float32


def _write_weights(opened: PackedCheckpoint, layout: _Layout, folder: Path) -> None:
    """All tensors: those of packed linears in the new layout, the others as they are."""
    owners = {
        f"{linear}.{kind}": linear for linear, kinds in opened.linears.items() for kind in kinds
    }
    writer = ShardWriter(folder)
    for path in weight_files(opened.body):
        with safe_open(path, "pt") as file:
            for name in list(file.keys()):
                linear = owners.get(name)
                if linear is None:
                    writer.add({name: file.get_tensor(name)})
                elif name.endswith(f".{opened.first}"):
                    writer.add(layout.tensors(linear, opened.read(linear)))

    writer.close()


def _write_settings(path: Path, settings: dict[str, Any] | None) -> None:
    config = read_json(path)
    config.pop("quantization_config", None)
    if settings is not None:
        config["quantization_config"] = settings
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
