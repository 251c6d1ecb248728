"""Which implementation does the heavy part of `ranges`, `rounding`, `refinement` and `scales`: plain operators or a kernel."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from awq._triton import triton_problem

BLOCK = 128  # columns between two products with all the rest


def kernels(name: str, device: torch.device) -> Any:
    """The module awq.core.`name` of Triton kernels on a GPU where Triton runs, else None."""
    if device.type != "cuda" or triton_problem(device) is not None:
        return None
    return importlib.import_module(f"awq.core.{name}")


def block_step(name: str, plain: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The kernel `name` of `rounding_kernels` on a GPU where Triton runs, else `plain`, the same in plain operators."""
    module = kernels("rounding_kernels", device)
    return plain if module is None else getattr(module, name)
