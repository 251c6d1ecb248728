"""Looking at and swapping linears of a model. GPT-2's `Conv1D` is a linear whose weight is stored transposed."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a dense linear this package can quantize."""
    return isinstance(module, (nn.Linear, Conv1D))


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features)."""
    rows, columns = cast(Tensor, module.weight).shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def get_weight(module: nn.Module) -> Tensor:
    """The weight as [out, in]; a view, so that in-place changes reach the module."""
    weight = cast(Tensor, module.weight).data
    return weight.t() if isinstance(module, Conv1D) else weight


def named_linears(root: nn.Module) -> dict[str, nn.Module]:
    """Name → linear for every dense linear below `root`."""
    return {name: module for name, module in root.named_modules() if is_linear(module)}


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` where `root.<name>` was."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)
