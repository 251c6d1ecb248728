"""One forward of an encoder, watched: what every linear, norm and embedding was given and made.

Also how a norm is recognized among what was watched. `structure` and `attention` read the rest from
the same events.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awq.nn.blocks import hidden_of, is_product

READING_ERROR = 3e-2  # relative: models compute in 16 bits


class NotReadable(Exception):
    """The structure is none that is known here; the message says what."""


@dataclass(frozen=True)
class NormPlan:
    """weight, bias float32 [width]; centered: LayerNorm, else RMSNorm."""

    weight: Tensor
    bias: Tensor
    eps: float
    centered: bool


@dataclass
class Event:
    """One call of a module: its first argument and its result."""

    module: nn.Module
    x: Tensor
    y: Tensor


@dataclass
class BlockEvents:
    """One call of a block: the calls inside, and hidden states [1, tokens, hidden] around it."""

    events: list[Event] = field(default_factory=list)
    given: Tensor = field(default_factory=lambda: torch.empty(0))
    made: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class Observation:
    """blocks: in their order. around: calls of norms and embeddings outside of blocks.

    last: the last hidden state [1, tokens, hidden].
    """

    blocks: list[BlockEvents]
    around: list[Event]
    last: Tensor


def observe(model: Any, blocks: list[nn.Module], ids: Tensor) -> Observation:
    """A forward of ids [1, tokens]. model: a copy that nobody else runs."""
    found = Observation([BlockEvents() for _ in blocks], [], torch.empty(0))
    handles = []
    inner: set[nn.Module] = set()
    for block, calls in zip(blocks, found.blocks):
        inner |= set(block.modules())
        handles.append(block.register_forward_hook(_block_hook(calls), with_kwargs=True))
        watched = [m for m in block.modules() if is_product(m) or is_norm(m)]
        handles += [m.register_forward_hook(_hook(calls.events)) for m in watched]
    outside = [m for m in model.modules() if m not in inner]
    watched = [m for m in outside if isinstance(m, nn.Embedding) or is_norm(m)]
    handles += [m.register_forward_hook(_hook(found.around)) for m in watched]
    try:
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    if getattr(output, "last_hidden_state", None) is None:
        raise NotReadable("its forward gives no hidden states")
    found.last = output.last_hidden_state
    return found


def _hook(events: list[Event]) -> Any:
    def note(module: nn.Module, args: tuple, output: Any) -> None:
        if args and isinstance(output, Tensor):
            events.append(Event(module, args[0].detach().clone(), output.detach().clone()))

    return note


def _block_hook(calls: BlockEvents) -> Any:
    def note(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        calls.given = given.detach().clone()
        calls.made = hidden_of(output).detach().clone()

    return note


def is_norm(module: nn.Module) -> bool:
    """Whether a leaf is a norm with a weight, by what it holds."""
    if list(module.children()) or isinstance(module, nn.Embedding) or is_product(module):
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


def distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖; infinite where the shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def near(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of 16-bit models."""
    return distance(a, b) <= READING_ERROR


def read_norm(event: Event) -> NormPlan:
    """LayerNorm or RMSNorm, whichever the numbers say. Raises NotReadable."""
    module: Any = event.module
    weight = module.weight.detach().float()
    bias = getattr(module, "bias", None)
    bias = torch.zeros_like(weight) if bias is None else bias.detach().float()
    eps = next(
        (
            float(getattr(module, n))
            for n in ("eps", "variance_epsilon")
            if getattr(module, n, None)
        ),
        0.0,
    )
    x, y = event.x.float(), event.y.float()
    plans = [
        NormPlan(scale, bias, eps, centered)
        for scale in (weight, weight + 1)
        for centered in (True, False)
    ]
    best = min(plans, key=lambda plan: distance(apply_norm(x, plan), y))
    if not near(apply_norm(x, best), y):
        raise NotReadable(f"{type(module).__name__} is neither LayerNorm nor RMSNorm")
    return best


def apply_norm(x: Tensor, norm: NormPlan) -> Tensor:
    """The norm of x float32 [..., width]."""
    shape = x.shape[-1:]
    if norm.centered:
        return F.layer_norm(x, shape, norm.weight, norm.bias, norm.eps)
    return F.rms_norm(x, shape, norm.weight, norm.eps) + norm.bias
