"""Show versions, devices and which kernels serve here: what a bug report needs."""

from __future__ import annotations

import argparse
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "triton",
    "llvmlite",
    "datasets",
    "sentence-transformers",
    "peft",
)
EXAMPLE_WIDTH = 256  # of the linear whose kernels are asked about


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It needs no arguments of its own."""


def run(arguments: argparse.Namespace) -> None:
    import os
    import platform

    import torch

    import awq
    from awq.cli.output import installed_version, show

    devices = [
        f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())
    ]
    found: dict[str, Any] = {
        "awq": awq.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "gpus": devices,
    }
    found |= {name: installed_version(name) for name in PACKAGES}

    # its own name for itself says which build it is (+cpu, +cu130)
    found["torch"] = torch.__version__
    found["variables"] = {
        name: os.environ[name]
        for name in sorted(os.environ)
        if name.startswith(("AWQ_", "OMP_NUM"))
    }
    found["kernels"] = _kernels()
    show(found, arguments.json, _for_people(found))


def _kernels() -> dict[str, dict[str, str]]:
    """Device → kernel → "yes", or why it cannot serve a linear of group size 128 in the usual dtype
    there."""
    import torch

    from awq.backends import reasons
    from awq.kernels.packed import Shape

    shape = Shape(EXAMPLE_WIDTH, EXAMPLE_WIDTH, 128)
    asked = {"cpu": torch.float32}
    if torch.cuda.is_available():
        asked["cuda"] = torch.float16

    found = {}
    for device, dtype in asked.items():
        why = reasons(torch.device(device), dtype, shape)
        found[device] = {name: reason or "yes" for name, reason in why.items()}

    return found


def _for_people(found: dict[str, Any]) -> str:
    lines = []
    for name, value in found.items():
        if name == "kernels":
            lines += _kernel_lines(value)
        else:
            lines.append(f"{name}: {_shown(value)}")
    return "\n".join(lines)


def _kernel_lines(kernels: dict[str, dict[str, str]]) -> list[str]:
    lines = []
    for device, answers in kernels.items():
        for kernel, answer in answers.items():
            lines.append(f"kernel {kernel} on {device}: {answer}")
    return lines


def _shown(value: Any) -> str:
    if value is None:
        return "not installed"

    if isinstance(value, dict):
        value = [f"{key}={inner}" for key, inner in value.items()]
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return str(value)
