"""A model's repeated blocks, and the linears in them."""

from __future__ import annotations

import copy

from torch import nn

from awq.errors import ModelError
from awq.nn.linear import WQLinear
from awq.nn.surgery import is_linear


class OneBlock(list):
    """One block of a list, whose inputs are recorded by themselves: it does not read just what the
    block before it gives. first: its place in the list."""

    def __init__(self, block: nn.Module, first: int) -> None:
        super().__init__([block])
        self.first = first


BlockList = tuple[str, "nn.ModuleList | OneBlock"]


def block_names(entry: BlockList) -> list[str]:
    """Full names of the blocks of a list."""
    prefix, blocks = entry
    first = blocks.first if isinstance(blocks, OneBlock) else 0
    return [f"{prefix}.{first + i}" for i in range(len(blocks))]


def find_block_lists(model: nn.Module) -> list[BlockList]:
    """(name, blocks) of the outermost module lists whose elements contain linears, in registration
    order.

    Raises ModelError when the model has none.
    """
    found: list[BlockList] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if (
            not inside
            and isinstance(module, nn.ModuleList)
            and len(module)
            and all(map(_has_products, module))
            and not all(isinstance(member, nn.ModuleList) for member in module)  # lists of lists
        ):
            found.append((name, module))

    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of repeated blocks with linear layers; nothing "
            "to quantize."
        )
    return found


def _has_products(block: nn.Module) -> bool:
    """Whether linears lie below a block; a list of linears is none of blocks."""
    return any(is_product(module) for module in block.modules() if module is not block)


def is_product(module: nn.Module) -> bool:
    """Whether a module is a linear, dense or packed."""
    return is_linear(module) or isinstance(module, WQLinear)


def float_copy(block: nn.Module) -> nn.Module:
    """A float32 copy of a block to experiment on."""
    return copy.deepcopy(block).float().eval()
