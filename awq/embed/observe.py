"""One forward of an encoder, watched: what every linear, norm and embedding was given and made.

Also how a norm is recognized among what was watched. `structure` and `attention` read the rest from
the same events.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from awq.kernels.reference.decode import apply_norm
from awq.kernels.specs import Norm
from awq.nn.block_calls import hidden_of
from awq.nn.blocks import float_copy, is_product
from awq.nn.hooks import Call, listening
from awq.nn.norms import is_norm, read_norm

READING_ERROR = 3e-2  # relative: models compute in 16 bits


class NotReadable(Exception):
    """The structure is none that is known here; the message says what."""


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
    with ExitStack() as stack:
        for block, calls in zip(blocks, found.blocks):
            stack.enter_context(listening([block], after=_block_noted(calls)))
            stack.enter_context(listening(_read_inside(block), after=_noted(calls.events)))
        stack.enter_context(listening(_read_around(model, blocks), after=_noted(found.around)))
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))

    if getattr(output, "last_hidden_state", None) is None:
        raise NotReadable("its forward gives no hidden states")

    found.last = output.last_hidden_state
    return found


def _read_inside(block: nn.Module) -> list[nn.Module]:
    """The modules of a block whose calls are read."""
    return [module for module in block.modules() if is_product(module) or is_norm(module)]


def _read_around(model: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    """Those outside of all blocks."""
    inner = {module for block in blocks for module in block.modules()}
    outside = [module for module in model.modules() if module not in inner]
    return [module for module in outside if isinstance(module, nn.Embedding) or is_norm(module)]


def _noted(events: list[Event]) -> Callable[[Call], None]:
    def note(call: Call) -> None:
        if call.args and isinstance(call.output, Tensor):
            x = call.args[0].detach().clone()
            y = call.output.detach().clone()
            events.append(Event(call.module, x, y))

    return note


def _block_noted(calls: BlockEvents) -> Callable[[Call], None]:
    def note(call: Call) -> None:
        given = call.args[0] if call.args else call.kwargs["hidden_states"]
        calls.given = given.detach().clone()
        calls.made = hidden_of(call.output).detach().clone()

    return note


def distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖; infinite where the shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    a = a.detach().double()
    b = b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def near(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of 16-bit models."""
    return distance(a, b) <= READING_ERROR


def norm_of(event: Event) -> Norm:
    """The norm of a watched call, with a weight and a bias of its own. Raises NotReadable."""
    norm = _norm_in_float32(event)
    if norm is None or not near(apply_norm(event.x.float(), norm), event.y):
        raise NotReadable(f"{type(event.module).__name__} is neither LayerNorm nor RMSNorm")

    width = event.x.shape[-1]
    device = event.x.device
    if norm.weight is None:
        norm = replace(norm, weight=torch.ones(width, dtype=torch.float32, device=device))
    if norm.bias is None:
        norm = replace(norm, bias=torch.zeros(width, dtype=torch.float32, device=device))

    return norm


@torch.no_grad()
def _norm_in_float32(event: Event) -> Norm | None:
    """Read off a float32 copy, on what was watched and moved away from a mean of zero, where
    LayerNorm and RMSNorm are one."""
    module = float_copy(event.module)
    x = event.x.float()
    x = x + x.std()
    return read_norm(module, x, module(x))
