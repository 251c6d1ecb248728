"""How transformers 5 holds the experts of a layer: two 3-D parameters (`gate_up_proj` and
`down_proj`) behind one contract, `forward(hidden_states [tokens, hidden], top_k_index [tokens,
top_k], top_k_weights [tokens, top_k])`.

A few classes keep the parameters without the flags of transformers' contract. Their flags are read
off shapes and signature. DBRX holds three parameters [experts · inner, hidden] below the module,
gate, up and down in that order (`stacks`). Llama 4's takes *sorted rows* in one argument,
`forward(hidden_states [experts · tokens, hidden])`: every expert has a row for every token,
weighted by the router beforehand, and zero where the token is not routed to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_CHOICE = ["hidden_states", "top_k_index", "top_k_weights"]  # what most classes take
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # of transformers' contract


class ExpertNames(NamedTuple):
    """What the three linears of an expert are called, below the expert's number ("w1", "w3",
    "w2")."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class ExpertShape:
    """How a class of experts stores its weights.

    has_gate: gate and up share one parameter; interleaved: their rows alternate instead of
    following each other;
    transposed: weights are [experts, in, out]; has_bias: there are biases [experts, out] beside
    them; sorted_rows: the forward takes every expert's rows in turn, and no choice of experts;
    identities: numbers from `num_experts` on that hand a token on as it is;
    stacks: names of three parameters below the module that hold gate, up and the transposed down of
    all experts one below the other, each [experts · inner, hidden].
    """

    num_experts: int
    hidden: int
    inner: int
    has_gate: bool = True
    interleaved: bool = False
    transposed: bool = False
    has_bias: bool = False
    sorted_rows: bool = False
    identities: int = 0
    stacks: tuple[str, ...] = ()

    def join(self, gate: Tensor, up: Tensor, dim: int) -> Tensor:
        """Gate and up beside each other along `dim`, as the class's activation takes them."""
        if not self.interleaved:
            return torch.cat([gate, up], dim)
        dim = dim % gate.dim()
        return torch.stack([gate, up], dim + 1).flatten(dim, dim + 1)

    def split(self, joined: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """(gate, up) as views; the inverse of `join`."""
        if not self.interleaved:
            half = joined.shape[dim] // 2
            return joined.narrow(dim, 0, half), joined.narrow(dim, half, half)

        index: list[Any] = [slice(None)] * joined.dim()
        index[dim] = slice(0, None, 2)
        gate = joined[tuple(index)]
        index[dim] = slice(1, None, 2)

        return gate, joined[tuple(index)]


def shape_of_experts(module: nn.Module) -> ExpertShape | None:
    """The shape of a module that holds experts as stacked parameters behind a contract that is
    known here, or None."""
    return _shape_of_pair(module) or _shape_of_stacks(module)


def _shape_of_stacks(module: nn.Module) -> ExpertShape | None:
    """Of three parameters of one shape, where nothing else is below the module."""
    if _arguments(module)[:3] != _CHOICE or isinstance(getattr(module, "shape", None), ExpertShape):
        return None

    parameters = dict(module.named_parameters())
    count = getattr(module, "num_experts", None)
    shapes = {parameter.shape for parameter in parameters.values()}
    if len(parameters) != 3 or len(shapes) != 1 or not isinstance(count, int) or count < 1:
        return None

    shape = shapes.pop()
    if len(shape) != 2 or shape[0] % count:
        return None

    return ExpertShape(count, shape[1], shape[0] // count, stacks=tuple(parameters))


def _shape_of_pair(module: nn.Module) -> ExpertShape | None:
    """Of two 3-D parameters: gate and up (or up alone), and down."""
    has_gate = bool(getattr(module, "has_gate", "gate_up_proj" in module._parameters))
    up = module._parameters.get("gate_up_proj" if has_gate else "up_proj")
    down = module._parameters.get("down_proj")
    if up is None or down is None or up.dim() != 3 or down.dim() != 3 or len(up) < len(down):
        return None

    sorted_rows = _takes_sorted_rows(module)
    if sorted_rows is None:
        return None

    parts = 2 if has_gate else 1
    # [experts, parts · inner, hidden] beside [experts, hidden, inner], or the last two axes of both
    # exchanged
    transposed = bool(
        getattr(
            module,
            "is_transposed",
            up.shape[2] == parts * down.shape[1] and up.shape[1] == down.shape[2],
        )
    )
    inner, hidden = (down.shape[1], down.shape[2]) if transposed else (down.shape[2], down.shape[1])
    rows = up.shape[2] if transposed else up.shape[1]
    if rows != parts * inner:
        return None

    interleaved = not getattr(module, "is_concatenated", True)
    has_bias = bool(getattr(module, "has_bias", "down_proj_bias" in module._parameters))
    identities = len(up) - len(down)

    return ExpertShape(
        len(down),
        hidden,
        inner,
        has_gate,
        interleaved,
        transposed,
        has_bias,
        sorted_rows,
        identities,
    )


def _takes_sorted_rows(module: nn.Module) -> bool | None:
    """Whether the forward takes rows sorted by expert; False: tokens and their choice of experts;
    None: something else."""
    if all(hasattr(module, flag) for flag in _FLAGS):
        return False

    given = _arguments(module)
    if given[:3] == _CHOICE:
        return False
    return True if given == ["hidden_states"] else None


def _arguments(module: nn.Module) -> list[str]:
    """What the forward of its class takes."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def fused_experts(model: nn.Module) -> dict[str, ExpertShape]:
    """Name → shape of every module that holds experts as stacked parameters behind a contract that
    is known here."""
    shapes = {name: shape_of_experts(module) for name, module in model.named_modules()}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def weight_names(shape: ExpertShape) -> list[str]:
    """Names of the parameters that hold all experts, gate and up first; dots lead below the
    module."""
    if shape.stacks:
        return list(shape.stacks)
    names = ["gate_up_proj" if shape.has_gate else "up_proj", "down_proj"]
    return names + [f"{name}_bias" for name in names if shape.has_bias]


def holder_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """(the module, the last part of the name) of a parameter below `module`."""
    path, _, leaf = name.rpartition(".")
    return (module.get_submodule(path) if path else module), leaf


def activation_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What stands between an expert's products: `act_fn`, or the only module below that holds
    nothing. Raises AttributeError where there is none."""
    own = getattr(module, "act_fn", None)
    if own is not None:
        return own

    members = [member for member in module.modules() if member is not module]
    bare = [m for m in members if not m._modules and not m._parameters and not m._buffers]
    if len(bare) != 1:
        raise AttributeError(f"{type(module).__name__} has no activation that is known here")
    return bare[0]
