"""Looking at and swapping linears of a model. GPT-2's `Conv1D` is a linear whose weight is stored
transposed."""

from __future__ import annotations

from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from awq.errors import ConfigError

LINEARS = (nn.Linear, Conv1D)
_acts_as_linear: dict[type, bool] = {}  # of subclasses with a forward of their own


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a dense linear this package can quantize.

    A subclass with a forward of its own may be one (falcon's), or a router that gives its choice,
    or a grouped product: it is one when it gives x Wᵀ + b.
    """
    if not isinstance(module, LINEARS):
        return False

    kind = type(module)
    if kind.forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if module.weight.is_meta:
        return _gives_product(module)

    if kind not in _acts_as_linear:
        _acts_as_linear[kind] = _gives_product(module)
    return _acts_as_linear[kind]


@torch.no_grad()
def _gives_product(module: nn.Module) -> bool:
    """On two rows of numbers; by shape alone on the meta device. Hooks are passed by."""
    weight = get_weight(module)
    bias = cast("Tensor | None", module.bias)
    x = (
        torch.linspace(-1, 1, 2 * weight.shape[1], dtype=torch.float32, device=weight.device)
        .view(2, -1)
        .to(weight.dtype)
    )
    try:
        y = type(module).forward(module, x)
        expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    except Exception:  # someone else's forward; one that fails here is no plain product
        return False

    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return False
    return y.is_meta or float((y.float() - expected).norm()) <= 0.03 * float(expected.norm())


def output_head(model: Any) -> nn.Module | None:
    """What gives a language model's logits: its own head, or that of the language model inside of
    it."""
    for part in (model, *model.children()):
        find = getattr(part, "get_output_embeddings", None)
        head = None if find is None else find()
        if head is not None:
            return head
    return None


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


def usable_device(wanted: Any = None) -> torch.device:
    """The device that `wanted` names ("cpu", "cuda", "cuda:1", a torch.device); None means the GPU
    if there is one.

    A GPU comes with its number. Raises ConfigError for what is no device and for a GPU that torch
    does not see.
    """
    try:
        device = torch.device(
            wanted if wanted is not None else "cuda" if torch.cuda.is_available() else "cpu"
        )
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f'device is {wanted!r}; use "cpu", "cuda" or "cuda:N".') from error

    if device.type != "cuda":
        return device

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise ConfigError(
            f'device is {str(wanted)!r}, but torch sees {count} GPUs; use "cpu", or install torch '
            "for GPUs."
        )
    if device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def device_of(module: nn.Module) -> torch.device:
    """Where its tensors are; a module with packed linears may have no parameter.

    The blocks of a model that is larger than memory stand on the meta device: another tensor of it
    says where it is.
    """
    tensors = list(chain(module.parameters(), module.buffers()))
    return next((tensor for tensor in tensors if not tensor.is_meta), tensors[0]).device


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` where `root.<name>` was."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)
