"""`get_best_device` and `clear_memory`."""

from __future__ import annotations

import gc
from typing import Any

import torch


def get_best_device() -> str:
    """The device to put a model on: mps, cuda:0, xpu:0 or cpu, in AutoAWQ's order."""
    if torch.backends.mps.is_available():
        return "mps"
    if torch.cuda.is_available():
        return "cuda:0"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "xpu:0"
    return "cpu"


def clear_memory(weight: Any = None) -> None:
    """Frees unreferenced memory, the GPU's cache too."""
    del weight
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
