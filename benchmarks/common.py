"""What the scripts share: the settings to compare, and the head of a result file (where, with what,
from which code and by which command it was made)."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_VERSIONS = (
    "torch",
    "transformers",
    "triton",
    "sentence-transformers",
    "onnxruntime",
    "openvino",
    "fastembed",
)
ROUND_TO_NEAREST = {"preset": "fast", "scaling": False, "clip": False, "bias_correction": False}


def jobs(presets: list[str], variants: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, options of the quantizer): "rtn" or presets, then a JSON list of {"name": …, option:
    …}."""
    chosen = [(p, ROUND_TO_NEAREST if p == "rtn" else {"preset": p}) for p in presets]
    return chosen + [(v.pop("name"), v) for v in json.loads(variants)]


def head(device: str) -> dict[str, Any]:
    """device: "cpu" or "cuda". Versions of packages that are not installed are None."""
    git = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(
        git, capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    cpu = f"{platform.machine()} cpu, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        **{name: _version(name) for name in _VERSIONS},
        "commit": commit,
        "command": " ".join(
            Path(a).name if Path(a).is_absolute() or os.path.exists(a) else a for a in sys.argv
        ),
    }


def write(path: Path, device: str, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(head(device) | result, indent=1) + "\n", encoding="utf-8")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
