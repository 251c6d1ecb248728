"""Writing a checkpoint: into a temporary sibling, renamed when it is complete, so that no half-written directory remains."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from awq.checkpoint.card import write_card
from awq.config import AwqConfig
from awq.errors import CheckpointError
from awq.nn.surgery import named_linears

logger = logging.getLogger("awq.checkpoint")

REPORT_FILE = "quantization_report.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_FOLDERS_LEFT = {"onnx", "openvino", ".git", ".cache", "__pycache__"}


@contextmanager
def complete_directory(target: str | Path) -> Iterator[Path]:
    """A temporary sibling of `target` that takes its place when the block ends well, and vanishes when it does not.

    Raises CheckpointError when the file system refuses (no space, no permission).
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write beside {target}: {error}.") from error
    try:
        yield work
        os.chmod(work, 0o755)
        if target.exists():
            old = work.with_name(work.name + ".old")
            target.rename(old)
            work.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            work.rename(target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"saving to {target} failed and was undone: {error}.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def save_checkpoint(
    model: nn.Module,
    directory: str | Path,
    config: AwqConfig,
    report: Any = None,
    source: str | Path | None = None,
    tokenizer: Any = None,
    shard_size: str | int = "5GB",
    packed: bool = True,
) -> None:
    """Saves a quantized transformers model with everything that belongs to it.

    report: a `QuantReport`, written as JSON and into the model card. source: directory of the original model; its files other
    than weights (tokenizer, chat template, modules.json, pooling …) are carried over. packed=False writes dense weights
    without a quantization config. Raises CheckpointError when writing fails; then nothing is left behind.
    """
    left = sorted(name for name, module in named_linears(model).items())
    settings = config.with_(modules_to_not_convert=tuple(left)).to_transformers_dict()
    quantizer, had = model.__dict__.pop("hf_quantizer", None), getattr(model.config, "quantization_config", None)
    with complete_directory(directory) as work:
        try:
            if packed:
                model.config.quantization_config = settings
            model.save_pretrained(work, max_shard_size=shard_size)
        finally:
            if quantizer is not None:
                model.hf_quantizer = quantizer
            if had is None and hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            elif had is not None:
                model.config.quantization_config = had
        if source is not None and Path(source).is_dir():
            copy_companions(Path(source), work)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        if report is not None:
            report.save(work / REPORT_FILE)
        write_card(work, config, report, source)


def copy_companions(source: Path, target: Path) -> None:
    """Copies every file of a model directory but its own weights; files already written are kept."""
    for path in sorted(source.iterdir()):
        destination = target / path.name
        if destination.exists() or path.name in _FOLDERS_LEFT:
            continue
        if path.is_dir():
            # Weights in a subfolder belong to other parts (dense heads of sentence-transformers) and stay as they are.
            shutil.copytree(path, destination, ignore=shutil.ignore_patterns(*_FOLDERS_LEFT))
        elif not path.name.endswith(_WEIGHTS) and path.suffix != ".py" or path.name.startswith(("modeling_", "configuration_")):
            if path.name not in ("config.json", "README.md", REPORT_FILE):
                shutil.copy(path, destination)


def read_settings(directory: str | Path) -> AwqConfig:
    """The storage settings of a saved checkpoint. Raises CheckpointError when it is not an AWQ checkpoint."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} has no config.json; it is not a model directory.")
    found = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    if not found:
        raise CheckpointError(f"{directory} is not quantized: config.json has no quantization_config.")
    return AwqConfig.from_dict(found)
