"""Reading a norm off a module by what it does to its input."""

from __future__ import annotations

from torch import Tensor, nn

from awq.generate.plan import Norm
from awq.kernels.reference.decode import apply_norm

_TOLERANCE = 1e-5  # relative, in float32


def is_norm(module: nn.Module) -> bool:
    """Whether a module without children could be a norm: its parameters are vectors, or its name
    says so."""
    if any(True for _ in module.children()) or isinstance(module, nn.Embedding):
        return False
    parameters = list(module.parameters(recurse=False))
    return all(p.dim() == 1 for p in parameters) and (
        bool(parameters) or "norm" in type(module).__name__.lower()
    )


def read_norm(module: nn.Module, x: Tensor, y: Tensor) -> Norm | None:
    """The norm that turns x into y (float32, [..., features]), with the module's own weights; None
    when it is another function."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    weight = weight.detach().float() if isinstance(weight, Tensor) else None
    bias = bias.detach().float() if isinstance(bias, Tensor) else None
    scale = y.abs().max().clamp(min=1e-30)
    for eps in _epsilons(module):
        for mean in (False, True):
            for effective in [weight] if weight is None else [weight, 1 + weight]:
                norm = Norm(effective, bias, eps, mean)
                try:
                    error = (apply_norm(x, norm) - y).abs().max()
                except RuntimeError:  # weights of another length than the last axis
                    return None
                if error <= _TOLERANCE * scale:
                    return norm
    return None


def _epsilons(module: nn.Module) -> list[float]:
    named = [getattr(module, name, None) for name in ("variance_epsilon", "eps", "epsilon")]
    return list(
        dict.fromkeys([e for e in named if isinstance(e, float)] + [1e-5, 1e-6, 1e-12, 0.0])
    )
