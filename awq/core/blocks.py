"""Which implementation walks a block of columns: the sequential part of `rounding` and of `refinement`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from awq._triton import triton_problem

BLOCK = 128  # columns between two products with all the rest


def block_step(name: str, plain: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The kernel `name` of `rounding_kernels` on a GPU where Triton runs, else `plain`, the same in plain operators."""
    if device.type != "cuda" or triton_problem(device) is not None:
        return plain
    from awq.core import rounding_kernels

    return getattr(rounding_kernels, name)
