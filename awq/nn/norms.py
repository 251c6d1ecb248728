"""Reading a norm off a module by what it does to its input.

LayerNorm or RMSNorm, with a weight or with one plus it, with this epsilon or that: the names of
classes do not say. So every form is computed on an input that the module was given, and the one
that gives the module's own output is the norm.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from awq.kernels.reference.decode import apply_norm
from awq.kernels.specs import Norm
from awq.nn.blocks import is_product

EXACT = 1e-5  # relative error of two ways to compute one norm in float32
_EPSILONS = (1e-5, 1e-6, 1e-12, 0.0)  # where the module names none


def is_norm(module: nn.Module) -> bool:
    """Whether a module without children could be a norm: its parameters are vectors, or its name
    says so."""
    if any(True for _ in module.children()):
        return False
    if isinstance(module, nn.Embedding) or is_product(module):
        return False

    parameters = list(module.parameters(recurse=False))
    if not parameters:
        return "norm" in type(module).__name__.lower()
    return all(parameter.dim() == 1 for parameter in parameters)


def read_norm(module: nn.Module, x: Tensor, y: Tensor) -> Norm | None:
    """The norm that turns x into y [..., features], with the module's own weights in float32; None
    when it is another function.

    Both are to come from a float32 module. What 16 bits round away, here an epsilon and there a
    mean, tells one form from another.
    """
    for norm in _forms(module):
        if any(t is not None and t.shape != x.shape[-1:] for t in (norm.weight, norm.bias)):
            return None
        if _relative_error(apply_norm(x, norm), y) <= EXACT:
            return norm
    return None


def _forms(module: nn.Module) -> Iterator[Norm]:
    """Every norm that the module's tensors could make."""
    weight = _vector(module, "weight")
    bias = _vector(module, "bias")
    scales = [weight] if weight is None else [weight, 1 + weight]
    for eps in _epsilons(module):
        for centered in (False, True):
            for scale in scales:
                yield Norm(scale, bias, eps, centered)


def _vector(module: nn.Module, name: str) -> Tensor | None:
    tensor = getattr(module, name, None)
    return tensor.detach().float() if isinstance(tensor, Tensor) else None


def _epsilons(module: nn.Module) -> list[float]:
    named = [getattr(module, name, None) for name in ("variance_epsilon", "eps", "epsilon")]
    return list(dict.fromkeys([*(eps for eps in named if isinstance(eps, float)), *_EPSILONS]))


def _relative_error(mine: Tensor, theirs: Tensor) -> float:
    """The largest difference beside the largest value."""
    if mine.shape != theirs.shape:
        return float("inf")
    scale = theirs.abs().max().clamp(min=1e-30)
    return float((mine - theirs).abs().max() / scale)
