"""Parts of a block that are left in the model's own code: what they are given, for any position.

Where attention, a recurrent mixer or an MLP is of a kind that `block` does not read, its module can
still run between fused parts, and where the residual stream is not read either, the whole block
can. Two things are needed. What a module is given beside hidden states must follow from positions
alone (rotary tables do, what is computed from token ids does not). And what it keeps between tokens
must be keys and values that go through transformers' attention interface, where our cache takes
them, or states that a cache of transformers holds without a place for every token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awq.generate.plan import Attention, BlockPlan, NotFusable, OwnCode, Table
from awq.generate.read.channels import same_numbers
from awq.generate.read.masks import MASKED
from awq.generate.read.mlp import MlpFound, left_as_it_is, read_mlp
from awq.generate.read.passes import PIECE
from awq.generate.read.residuals import Branch, read_residuals
from awq.generate.read.settings import settings_of
from awq.generate.read.trace import ModuleCall, Trace
from awq.nn.block_calls import CACHES, BlockCall
from awq.nn.norms import is_norm


@dataclass
class Unknown:
    """Stands for an argument that positions do not tell. why: what is wrong with it."""

    why: str


class Templates:
    """Makes templates of calls: `Table`s in place of tensors. A tensor that several blocks are
    given becomes one table."""

    def __init__(self) -> None:
        # the tensors are kept, so that no other one has their number
        self._known: dict[int, tuple[Tensor, Any]] = {}

    def of(self, near: BlockCall, everywhere: BlockCall, changed: BlockCall) -> BlockCall:
        """near: a block's call at the first positions; everywhere: at all positions, [pieces,
        PIECE]; changed: at the first ones with other tokens."""
        args = tuple(map(self._value, near.args, everywhere.args, changed.args))
        kwargs = {
            key: self._value(value, everywhere.kwargs.get(key), changed.kwargs.get(key))
            for key, value in near.kwargs.items()
        }
        return BlockCall(args, kwargs, near.where)

    def _value(self, near: Any, everywhere: Any, changed: Any) -> Any:
        if isinstance(near, Tensor):
            if not isinstance(everywhere, Tensor) or not isinstance(changed, Tensor):
                return Unknown("is not always given")
            if id(everywhere) not in self._known:
                self._known[id(everywhere)] = everywhere, _template(near, everywhere, changed)
            return self._known[id(everywhere)][1]

        if isinstance(near, (tuple, list)) and len(near):
            try:
                return type(near)(map(self._value, near, everywhere, changed))
            except TypeError:
                return Unknown("is of another kind for other positions")
        return near


def _template(near: Tensor, everywhere: Tensor, changed: Tensor) -> Any:
    if near.shape != changed.shape or not torch.equal(near, changed):
        return Unknown("depends on the tokens")
    if _is_mask(everywhere):
        return None  # attention knows what it may see

    pieces = everywhere.numel() // max(1, everywhere[..., :1].numel())
    shape = everywhere.shape
    if everywhere.dim() >= 2 and shape[1] == PIECE:
        return Table(everywhere.flatten(0, 1))

    if everywhere.dim() == 4 and shape[2] == PIECE:
        if all(torch.equal(everywhere[0], other) for other in everywhere[1:]):
            return Table(everywhere[0].flatten(0, 1), shape[0])

    if everywhere.dim() == 1 and pieces == PIECE:
        return None  # numbers of the columns, which transformers 4 gave every block
    return Unknown("does not follow from the positions")


def _is_mask(tensor: Tensor) -> bool:
    """Whether it says which tokens are seen: by 1, True, or by 0 where others have a large negative
    number."""
    if tensor.shape[-1] != PIECE:
        return False
    if tensor.dim() == 4 and tensor.shape[-2] in (1, PIECE):
        if tensor.dtype == torch.bool:
            return True
        return bool(((tensor == 0) | (tensor <= MASKED)).all())
    return tensor.dim() == 2 and not tensor.is_floating_point() and bool((tensor == 1).all())


def own_plans(found: Trace, given: BlockCall, template: BlockCall, reason: str) -> Iterator:
    """Plans with the mixer, then with the whole block, in the model's own code, best first; each is
    a guess.

    found: a trace of the block as it was called by `given`; template: that of the call. reason: why
    nothing better is known.
    """
    if found.calls > 1:
        return

    attention = None if found.attention is None else _attention_of(found)
    known = _Known(given, template)
    for call in _mixers(found):
        try:
            own = OwnCode(
                call.name, known.express(call.call), _cache_key(call.module), attention, reason
            )
            yield _around(found, call, own)
        except NotFusable:
            continue

    block = next((call for call in found.modules if not call.name), None)
    if block is not None:
        own = OwnCode("", known.express(block.call), _cache_key(block.module), attention, reason)
        yield BlockPlan(attention, None, None, None, False, 1.0, None, None, None, None, own=own)


def _attention_of(found: Trace) -> Attention:
    call = found.attention
    assert call is not None
    settings = settings_of(call)

    return Attention(
        heads=call.q.shape[1],
        kv_heads=call.k.shape[1],
        head_dim=call.q.shape[-1],
        value_dim=call.v.shape[-1],
        rotary=0,
        **settings,
    )


def _mixers(found: Trace) -> list[ModuleCall]:
    """Modules that could be the first branch of the block, the likeliest first: the innermost one
    in which attention runs; without attention the outermost that reads the block's input or a norm
    of it."""
    inner = [call for call in found.modules if call.name]
    if found.calls:
        return [call for call in reversed(inner) if call.attends]

    inputs = [found.hidden]
    inputs += [e.y for e in found.events if is_norm(e.module) and same_numbers(e.x, found.hidden)]

    return [call for call in inner if any(same_numbers(call.x, x) for x in inputs)]


def _around(found: Trace, mixer: ModuleCall, own: OwnCode) -> BlockPlan:
    """The plan of a block whose mixer is one module."""
    inside = f"{mixer.name}."
    events = [event for event in found.events if not event.name.startswith(inside)]
    begun = found.modules.index(mixer)
    later = [c for c in found.modules[begun + 1 :] if c.name and not c.name.startswith(inside)]
    mlp = _rest(found, events, later)
    residuals = read_residuals(
        found, Branch(mixer.x, mixer.y), None if mlp is None else Branch(mlp.x, mlp.y)
    )

    return residuals.plan(
        attention=own.attention,
        qkv=None,
        attention_out=None,
        mlp=None if mlp is None else mlp.plan,
        own=own,
    )


def _rest(found: Trace, events: Sequence, later: Sequence[ModuleCall]) -> MlpFound | None:
    """The second branch: what is read of it, else the module that computes it; None where no linear
    is left."""
    try:
        return read_mlp(found, events)
    except NotFusable as reason:
        if later and not later[0].call.args and not _tensors_in(later[0].call.kwargs):
            return left_as_it_is(later[0].name, later[0].x, later[0].y, str(reason))
        if not any(True for event in events if not is_norm(event.module)):
            return None
        raise


def _tensors_in(values: dict[str, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in values.values())


class _Known:
    """Expresses what a module was given by what its block was given."""

    def __init__(self, given: BlockCall, template: BlockCall) -> None:
        self._templates: dict[int, Any] = {}
        pairs = zip(
            (*given.args, *given.kwargs.values()), (*template.args, *template.kwargs.values())
        )
        for value, its_template in pairs:
            self._note(value, its_template)

    def _note(self, value: Any, its_template: Any) -> None:
        if isinstance(value, Tensor):
            self._templates[id(value)] = its_template
        elif isinstance(value, (tuple, list)) and isinstance(its_template, (tuple, list)):
            for part, its in zip(value, its_template):
                self._note(part, its)

    def express(self, call: BlockCall) -> BlockCall:
        """Raises NotFusable where it cannot."""
        args = tuple(map(self._value, call.args))
        kwargs = {key: self._value(value) for key, value in call.kwargs.items()}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = True
        return BlockCall(args, kwargs, call.where)

    def _value(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            found = self._templates.get(id(value), Unknown("is made inside of the block"))
            if isinstance(found, Unknown):
                raise NotFusable(f"a module of the block is given a tensor that {found.why}")
            return found
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._value, value))
        if isinstance(value, dict):
            return {key: self._value(inner) for key, inner in value.items()}
        return value


def _cache_key(module: nn.Module) -> str | None:
    """The keyword under which a module takes a cache."""
    taken = inspect.signature(module.forward).parameters
    return next((name for name in CACHES if name in taken), None)
