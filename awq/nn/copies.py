"""Copies of a model's modules that share its tensors: something to look at, hook and replace
forwards in, at no cost of memory.

Reading a model's structure puts hooks and other forwards into modules. On the live model that would
disturb every call that runs meanwhile, so it is done on such a copy. A save reads one too, because
saving changes the config for a moment.
"""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def copy_structure(model: Module) -> Module:
    """A copy of all modules and plain attributes; parameters and buffers are the very tensors of
    the model.

    Modules with a copying of their own follow it: slices of joined siblings become packed linears
    again. Raises what `copy.deepcopy` raises for attributes that cannot be copied.
    """
    shared = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            shared[id(tensor)] = tensor
    return copy.deepcopy(model, shared)
