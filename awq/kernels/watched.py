"""Whether anybody but the operator itself has to see a call of it.

torch hands a call of an operator through autograd, modes and transforms, several of them in Python.
Around a product of one token that takes as long as the product. Where none of them has anything to
do, the operator's function is called directly, with the same result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_C: Any = torch._C
try:
    _modes_of_operators = _C._len_torch_dispatch_stack
    _modes_of_functions = _C._len_torch_function_stack
    _transforms = _C._functorch.peek_interpreter_stack
    _tracing = _C._get_tracing_state
except AttributeError:  # a torch that names them otherwise: every call goes all the way

    def _modes_of_operators() -> int:
        return 1


def watched(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a call with these tensors must go through torch: for gradients, under torch.compile
    or a mode, inside of vmap and the like, while tracing, or with tensors of other
    classes or without data."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta:
        return True
    if _modes_of_operators() or _modes_of_functions() or _transforms() is not None or _tracing():
        return True
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(t is not None and t.requires_grad for t in others)
