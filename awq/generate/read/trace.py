"""Running one block on random hidden states and noting what every module in it, and attention, read
and wrote.

The block is a float32 copy. Attention is caught at transformers' own interface, where the model
says how it scales, caps and windows; a block that does not go through it has no `attention` and is
not fused. With `neutral`, rotary tables are replaced by those of position 0, so that queries and
keys reach attention unrotated and can be recognized among the linears' outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from awq.generate.plan import NotFusable
from awq.kernels.reference.attention import attend
from awq.nn.block_calls import BlockCall, hidden_of, split_call
from awq.nn.blocks import is_product
from awq.nn.hooks import Call, listening
from awq.nn.packed_experts import AwqExperts

# A name of our own in transformers' table: another model's attention must not be caught, whatever
# thread it runs in.
_INTERFACE = "awq_trace"
_caught: ContextVar[Callable[..., Any]] = ContextVar("awq_trace")
ALL_ATTENTION_FUNCTIONS[_INTERFACE] = lambda *args, **kwargs: _caught.get()(*args, **kwargs)


@dataclass
class Event:
    """One call of a module without children, or of a mixture of experts: x and y are its first
    argument and its result."""

    name: str
    module: nn.Module
    x: Tensor
    y: Tensor


@dataclass
class ModuleCall:
    """One call of a module with children, the block itself among them, that turns hidden states
    into hidden states: x and y [batch, tokens, features]. call: what it was given beside x.
    attends: whether attention ran inside."""

    name: str
    module: nn.Module
    call: BlockCall
    x: Tensor
    y: Tensor
    attends: bool


@dataclass
class AttentionCall:
    """q [batch, heads, tokens, head_dim], k and v [batch, kv_heads, tokens, head_dim]; settings:
    what else attention was told."""

    q: Tensor
    k: Tensor
    v: Tensor
    y: Tensor
    settings: dict[str, Any]


@dataclass
class Trace:
    hidden: Tensor
    out: Tensor
    before: list[Event] = field(default_factory=list)  # events up to the attention
    after: list[Event] = field(default_factory=list)
    attention: AttentionCall | None = None
    calls: int = 0  # of attention
    modules: list[ModuleCall] = field(default_factory=list)  # in the order in which they begin

    @property
    def events(self) -> list[Event]:
        return self.before + self.after


@torch.no_grad()
def trace(block: nn.Module, call: BlockCall, hidden: Tensor, neutral: bool = False) -> Trace:
    """block: a float32 copy; hidden: float32 [batch, tokens, features]."""
    found = Trace(hidden, hidden)
    mixtures = mixtures_of(block)

    watched = {
        module: name
        for name, module in block.named_modules()
        if is_product(module) or module in mixtures or not any(True for _ in module.children())
    }

    def note(call: Call) -> None:
        x = call.args[0] if call.args else None
        y = hidden_of(call.output) if call.module in mixtures else call.output
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            events = found.after if found.attention else found.before
            events.append(Event(watched[call.module], call.module, x, y))

    def attention(module, query, key, value, attention_mask=None, scaling=None, **settings):
        found.calls += 1
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        y = attend(
            query,
            key,
            value,
            scaling,
            settings.get("softcap"),
            settings.get("sliding_window"),
            sinks=settings.get("s_aux"),
        )
        found.attention = AttentionCall(query, key, value, y, {"scaling": scaling, **settings})

        return y.transpose(1, 2).contiguous(), None

    try:
        parts = _Parts(block, found)
        inside = listening(parts.names, parts.begin, parts.end)
        with inside, listening(watched, after=note), _attention_replaced(block, attention):
            found.out = (neutralized(call) if neutral else call).run(block, hidden)
    except Exception as error:  # someone else's forward, which may fail in any way
        raise NotFusable(
            f"the block cannot be run alone: {type(error).__name__}: {error}"
        ) from error

    return found


class _Parts:
    """Notes the calls of a block's modules with children in its trace."""

    def __init__(self, block: nn.Module, found: Trace) -> None:
        self.found = found
        self.names = {
            module: name
            for name, module in block.named_modules()
            if any(True for _ in module.children())
        }
        self._begun: list[tuple[int, int]] = []  # of the calls that run now

    def begin(self, _call: Call) -> None:
        """The forward of a part begins."""
        self._begun.append((len(self.found.modules), self.found.calls))

    def end(self, call: Call) -> None:
        """The forward of a part has ended."""
        place, calls = self._begun.pop()
        if not _is_given_a_tensor(call):
            return

        x, others = split_call(call.args, call.kwargs)
        y = hidden_of(call.output)
        if not isinstance(y, Tensor) or not y.numel() == x.numel() == self.found.hidden.numel():
            return

        attends = self.found.calls > calls
        name = self.names[call.module]
        self.found.modules.insert(place, ModuleCall(name, call.module, others, x, y, attends))


def _is_given_a_tensor(call: Call) -> bool:
    if call.args:
        return isinstance(call.args[0], Tensor)
    return any(isinstance(value, Tensor) for value in call.kwargs.values())


def mixtures_of(block: nn.Module) -> set[nn.Module]:
    """The modules that hold packed experts and what chooses among them."""
    names = [name for name, module in block.named_modules() if isinstance(module, AwqExperts)]
    return {block.get_submodule(name.rpartition(".")[0]) for name in names if "." in name}


def holds_packed_experts(module: nn.Module) -> bool:
    return any(isinstance(member, AwqExperts) for member in module.modules())


def rotary_tables(call: BlockCall) -> dict[str, tuple[Tensor, Tensor]]:
    """Keyword → (cos, sin) for every pair of tables that a block is given, in whichever order the
    block takes them.

    call: one whose first token has position 0.
    """
    found = {}
    for name, pair in _pairs(call).items():
        first, second = map(_of_text, pair)
        found[name] = (second, first) if _sine_first(first) else (first, second)
    return found


def _of_text(table: Tensor) -> Tensor:
    """One table instead of three or four equal ones, for the time and place of parts of an image:
    those of text are all the same."""
    if table.dim() == 4 and all(torch.equal(table[0], other) for other in table[1:]):
        return table[0]
    return table


def neutralized(call: BlockCall) -> BlockCall:
    """The call with the rotary tables of position 0: cos 1, sin 0."""
    tables = {}
    for name, (first, second) in _pairs(call).items():
        sine_first = _sine_first(first)
        tables[name] = (torch.full_like(first, not sine_first), torch.full_like(second, sine_first))
    return replace(call, kwargs={**call.kwargs, **tables})


def _pairs(call: BlockCall) -> dict[str, tuple[Tensor, Tensor]]:
    """Keyword → two tables of one shape [..., tokens, r], as the block is given them."""
    found = {}
    for name, value in call.kwargs.items():
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            continue
        if not all(isinstance(t, Tensor) and t.is_floating_point() for t in value):
            continue
        if value[0].shape == value[1].shape and value[0].dim() >= 2:
            found[name] = (value[0], value[1])
    return found


def _sine_first(table: Tensor) -> bool:
    """Whether the first table of a pair holds sines (GPT-J's does): at position 0 they are 0."""
    return not bool(table.reshape(-1, table.shape[-1])[0].any())


@contextmanager
def _attention_replaced(block: nn.Module, function) -> Iterator[None]:
    """The block's attention goes through `function`; its configs are copies, like the block."""
    for module in block.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = _INTERFACE

    token = _caught.set(function)
    try:
        yield
    finally:
        _caught.reset(token)
