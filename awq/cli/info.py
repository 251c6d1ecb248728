"""Show what kind of checkpoint a directory is, how it is quantized, and how large it is.

It reads `config.json` and the headers of the weight files, and imports neither torch nor transformers for it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="quantized directory")


def run(arguments: argparse.Namespace) -> None:
    from awq.cli.output import show
    from awq.config import AwqConfig
    from awq.errors import CheckpointError

    directory = _body(Path(arguments.model))
    config = _read(directory / "config.json")
    stored = config.get("quantization_config")
    if not stored:
        raise CheckpointError(f"{directory} is not quantized: config.json has no quantization_config.")
    settings = AwqConfig.from_file(stored)
    files, names = _tensors(directory)
    packed = [name for name in names if name.endswith(".qweight")]
    result: dict[str, Any] = {"model_type": config.get("model_type"), "architectures": config.get("architectures")}
    result |= settings.to_dict()
    result |= {"quantized_linears": len(packed), "tensors": len(names), "weight_files": len(files)}
    result["weight_bytes"] = sum(file.stat().st_size for file in files)
    show(result, arguments.json, _for_people(result))


def _body(directory: Path) -> Path:
    """The folder of the transformer: the directory itself, or what modules.json of sentence-transformers names first."""
    from awq.errors import ModelError

    if not directory.is_dir():
        raise ModelError(f"model {directory} does not exist as a directory.")
    modules = directory / "modules.json"
    if modules.is_file() and not (directory / "config.json").is_file():
        listed = _read(modules)
        if isinstance(listed, list) and listed and isinstance(listed[0], dict):
            return directory / str(listed[0].get("path", ""))
    return directory


def _read(path: Path) -> Any:
    from awq.errors import CheckpointError

    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}; it is not a model directory.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def _tensors(directory: Path) -> tuple[list[Path], list[str]]:
    """Weight files and the names of their tensors."""
    from safetensors import SafetensorError, safe_open

    from awq.errors import CheckpointError

    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({directory / name for name in _read(index)["weight_map"].values()})
    else:
        files = sorted(directory.glob("*.safetensors"))
    names: list[str] = []
    for file in files:
        try:
            with safe_open(file, "numpy") as opened:
                names += opened.keys()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}.") from error
    if not names:
        raise CheckpointError(f"{directory} holds no safetensors files with weights.")
    return files, names


def _for_people(result: dict[str, Any]) -> str:
    skipped = result["modules_to_not_convert"] or []
    shown = ", ".join(skipped[:4]) + (f" and {len(skipped) - 4} more" if len(skipped) > 4 else "")
    size = "the whole row" if result["q_group_size"] == -1 else result["q_group_size"]
    lines = {
        "model": f"{result['model_type']} ({', '.join(result['architectures'] or ['no architecture named'])})",
        "quantized linears": f"{result['quantized_linears']}, {result['w_bit']} bits",
        "group size": size,
        "version": result["version"],
        "zero points": "yes" if result["zero_point"] else "no",
        "not quantized": shown or "nothing named",
        "weights": f"{result['weight_bytes'] / 1e6:.1f} MB in {result['weight_files']} files, {result['tensors']} tensors",
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items())
