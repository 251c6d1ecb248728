"""Show how a directory is quantized, how large it is, and what loads it.

It reads `config.json` and the headers of the weight files, and imports neither torch nor
transformers for it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from awq.config import AwqConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="quantized directory")


def run(arguments: argparse.Namespace) -> None:
    from awq.checkpoint.card import readers_of
    from awq.checkpoint.files import check_directory, read_json, tensor_headers, weight_files
    from awq.checkpoint.modules import body_directory
    from awq.cli.output import show
    from awq.errors import CheckpointError, ModelError

    root = Path(arguments.model)
    if not root.is_dir():
        raise ModelError(f"model {root} does not exist as a directory.")

    directory = body_directory(root)
    check_directory(directory)
    config = read_json(directory / "config.json")
    stored = config.get("quantization_config")
    if not isinstance(stored, dict):
        raise CheckpointError(
            f"{directory} is not quantized: config.json has no quantization_config."
        )

    files = weight_files(directory)
    headers = tensor_headers(files)
    settings, layout, linears = _packed(stored, headers)
    result: dict[str, Any] = {
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures"),
    }
    result |= settings.to_dict() | {"version": layout}
    result |= {
        "quantized_linears": linears,
        "tensors": len(headers),
        "weight_files": len(files),
        "weight_bytes": sum(file.stat().st_size for file in files),
        "loaded_by": readers_of(root, settings, layout),
    }
    show(result, arguments.json, _for_people(result))


def _packed(stored: dict[str, Any], headers: dict[str, Any]) -> tuple[AwqConfig, str, int]:
    """(settings, layout, how many linears are packed)."""
    from awq.checkpoint.files import packed_among
    from awq.config import COMPRESSED_TENSORS, AwqConfig

    if stored.get("quant_method") == COMPRESSED_TENSORS:
        from awq.checkpoint import compressed_tensors  # which imports torch

        settings = compressed_tensors.read_settings(stored, headers)
        return settings, COMPRESSED_TENSORS, len(compressed_tensors.linears_among(headers))

    settings = AwqConfig.from_file(stored)
    return settings, settings.format, len(packed_among(headers))


def _for_people(result: dict[str, Any]) -> str:
    skipped = result["modules_to_not_convert"] or []
    shown = ", ".join(skipped[:4]) + (f" and {len(skipped) - 4} more" if len(skipped) > 4 else "")
    size = "the whole row" if result["q_group_size"] == -1 else result["q_group_size"]
    architectures = result["architectures"] if isinstance(result["architectures"], list) else []
    named = ", ".join(str(name) for name in architectures)
    lines = {
        "model": f"{result['model_type']} ({named or 'no architecture named'})",
        "quantized linears": f"{result['quantized_linears']}, {result['w_bit']} bits",
        "group size": size,
        "version": result["version"],
        "zero points": "yes" if result["zero_point"] else "no",
        "not quantized": shown or "nothing named",
        "weights": _weights(result),
        "loaded by": ", ".join(result["loaded_by"]),
    }

    return "\n".join(f"{name}: {value}" for name, value in lines.items())


def _weights(result: dict[str, Any]) -> str:
    """Their size, in how many files and tensors."""
    megabytes = result["weight_bytes"] / 1e6
    files = result["weight_files"]
    place = "1 file" if files == 1 else f"{files} files"
    return f"{megabytes:.1f} MB in {place}, {result['tensors']} tensors"
