"""Finding a model's repeated blocks and running them one at a time.

A transformers model calls each block with its own arguments (masks, rotary tables: some models give
every layer different ones). They are recorded in a *skeleton pass*: every block is replaced by a
stub that notes its arguments and hands its hidden states on unchanged, so recording costs an
embedding lookup, not a forward.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awq.errors import ModelError
from awq.nn.hooks import hooked
from awq.nn.linear import WQLinear
from awq.nn.surgery import is_linear

_CACHES = ("past_key_values", "past_key_value", "layer_past", "past", "cache", "cache_params")
_FLAGS = {"use_cache": False, "output_attentions": False}

# [rows, tokens]; a decoder's, too
_TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_SHORT_TOKENS = 16  # of a true pass that only shows what runs, and what it returns

BlockList = tuple[str, nn.ModuleList]


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a module's output: the tensor itself or the first element of a tuple."""
    return output[0] if isinstance(output, (tuple, list)) else output


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
        ):
            found.append((name, module))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of repeated blocks with linear layers; nothing "
            "to quantize."
        )
    return found


@torch.no_grad()
def reached_lists(
    model: nn.Module, lists: Sequence[BlockList], item: dict[str, Tensor]
) -> list[BlockList]:
    """The lists whose blocks all run when the model is called with `item`, in the order in which
    they begin.

    A vision tower does not run on text. An encoder begins before its decoder, wherever it is
    registered. Raises ModelError when the model's forward fails.
    """
    order: dict[str, int] = {}
    names = [f"{prefix}.{j}" for prefix, blocks in lists for j in range(len(blocks))]

    def note(name: str, _args: tuple) -> None:
        order.setdefault(name, len(order))

    with hooked(model, names, before=note):
        _forward(model, _short(item))
    reached = [
        (prefix, blocks)
        for prefix, blocks in lists
        if all(f"{prefix}.{j}" in order for j in range(len(blocks)))
    ]
    return sorted(reached, key=lambda entry: order[f"{entry[0]}.0"])


def _has_products(block: nn.Module) -> bool:
    """Whether linears lie below a block; a list of linears is none of blocks."""
    return any(is_product(module) for module in block.modules() if module is not block)


def is_product(module: nn.Module) -> bool:
    """Whether a module is a linear, dense or packed."""
    return is_linear(module) or isinstance(module, WQLinear)


def float_copy(block: nn.Module) -> nn.Module:
    """A float32 copy of a block to experiment on."""
    return copy.deepcopy(block).float().eval()


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Applies `change` to every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        mapped = [map_tensors(v, change) for v in value]
        return type(value)(mapped) if type(value) in (tuple, list) else type(value)(*mapped)
    if type(value) is dict:
        return {k: map_tensors(v, change) for k, v in value.items()}
    return value


@dataclass
class BlockCall:
    """Arguments of one call of one block without its hidden states.

    where: key of the hidden states among the keyword arguments; None when they are the first
    positional argument.
    """

    args: tuple
    kwargs: dict[str, Any]
    where: str | None = None

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's new hidden states for `hidden` [batch, tokens, features]."""
        if self.where is None:
            return hidden_of(block(hidden, *self.args, **self.kwargs))
        return hidden_of(block(*self.args, **{self.where: hidden, **self.kwargs}))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> BlockCall:
        """The same call with tensors on `device`, floating ones as `dtype`."""

        def move(t: Tensor) -> Tensor:
            return (
                t.to(device, dtype) if dtype is not None and t.is_floating_point() else t.to(device)
            )

        return BlockCall(map_tensors(self.args, move), map_tensors(self.kwargs, move), self.where)


@dataclass
class BlockCalls:
    """calls[list][input][block] and hidden[list][input]: what enters the first block of each
    list."""

    calls: list[list[list[BlockCall]]]
    hidden: list[list[Tensor]]


def split_call(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """Separates the hidden states [batch, tokens, features] from a block's other arguments, and
    drops caches."""
    kept = {
        key: value for key, value in kwargs.items() if key not in _CACHES and not _is_cache(value)
    }
    kept |= {flag: value for flag, value in _FLAGS.items() if flag in kwargs}
    args = tuple(None if _is_cache(a) else a for a in args)
    if args and isinstance(args[0], Tensor):
        return args[0], BlockCall(args[1:], kept)
    where = _key_of_hidden(kept)
    hidden = kept.pop(where)
    return hidden, BlockCall(args, kept, where)


def _key_of_hidden(kwargs: dict[str, Any]) -> str:
    if "hidden_states" in kwargs:
        return "hidden_states"
    return next(key for key, value in kwargs.items() if isinstance(value, Tensor))


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


@torch.no_grad()
def record_block_calls(
    model: nn.Module,
    lists: Sequence[BlockList],
    inputs: Sequence[dict[str, Tensor]],
    run: Callable[[nn.Module, dict[str, Tensor]], Any] | None = None,
) -> BlockCalls:
    """Records how the model calls every block for each input (keyword arguments of the model's
    forward).

    run: calls the model; default: its body, for the head is not needed.

    Raises ModelError when the model's own forward fails on an input, or never calls a block.
    """
    blocks = {
        (i, j): block for i, (_, members) in enumerate(lists) for j, block in enumerate(members)
    }
    wraps = _output_structures(model, lists, inputs[0])
    recorded: list[list[list[BlockCall]]] = [[] for _ in lists]
    entering: list[list[Tensor]] = [[] for _ in lists]
    for item in inputs:
        seen: dict[tuple[int, int], tuple[Tensor, BlockCall]] = {}
        stubs = {block: _stub(seen, key, wraps[key]) for key, block in blocks.items()}
        with replaced_forwards(stubs):
            (run or _forward)(model, item)
        for i, (name, members) in enumerate(lists):
            missing = [j for j in range(len(members)) if (i, j) not in seen]
            if missing:
                raise ModelError(
                    f"{name}.{missing[0]} is never called by the model's forward; it cannot be "
                    "calibrated."
                )
            entering[i].append(seen[i, 0][0].detach())
            recorded[i].append([seen[i, j][1] for j in range(len(members))])
    return BlockCalls(recorded, entering)


def _stub(seen: dict, key: tuple[int, int], wrap: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """A forward that notes its arguments in `seen` and hands the hidden states on."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, call = split_call(args, kwargs)
        seen[key] = hidden, call
        return wrap(hidden)

    return forward


def _output_structures(
    model: nn.Module, lists: Sequence[BlockList], item: dict[str, Tensor]
) -> dict[tuple[int, int], Callable[[Tensor], Any]]:
    """For every block, a function that puts hidden states into the structure of the block's own
    output.

    Learnt from one true pass over the beginning of one row.
    """
    keys = {
        f"{prefix}.{j}": (i, j)
        for i, (prefix, blocks) in enumerate(lists)
        for j in range(len(blocks))
    }
    wraps: dict[tuple[int, int], Callable[[Tensor], Any]] = dict.fromkeys(keys.values(), _as_it_is)

    def learn(name: str, output: Any) -> None:
        if isinstance(output, (tuple, list)):
            rest = (None,) * (len(output) - 1)
            wraps[keys[name]] = lambda hidden: (hidden, *rest)

    with hooked(model, keys, after=learn):
        _forward(model, _short(item))
    return wraps


def _short(item: dict[str, Tensor]) -> dict[str, Tensor]:
    """The beginning of the first row of a model's inputs, without padding."""
    short = {}
    for name, tensor in item.items():
        row = tensor[:1]
        if name.endswith(_TOKEN_INPUTS):
            row = row[:, :_SHORT_TOKENS]
        short[name] = torch.ones_like(row) if name.endswith("attention_mask") else row
    return short


def _as_it_is(hidden: Tensor) -> Tensor:
    return hidden


def _forward(model: nn.Module, item: dict[str, Tensor]) -> None:
    """Runs the model's body (its head is not needed) without a cache."""
    body = getattr(model, "base_model", model)
    try:
        body(**item, **no_cache(body))
    except (
        TypeError,
        ValueError,
        LookupError,
        RuntimeError,
        AttributeError,
        AssertionError,
    ) as error:
        shapes = {k: tuple(v.shape) for k, v in item.items()}
        raise ModelError(
            f"the model's forward fails on calibration inputs of shapes {shapes}: {error}"
        ) from error


def no_cache(model: nn.Module) -> dict[str, bool]:
    """What tells a model's forward to keep no cache; nothing where it knows none, as encoders."""
    if getattr(getattr(model, "config", None), "use_cache", None) is None:
        return {}
    taken = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
    return {"use_cache": False} if open_ended or "use_cache" in taken else {}


@contextmanager
def replaced_forwards(replacements: dict[nn.Module, Any]) -> Iterator[None]:
    """Gives modules another `forward` for a while. One set on the instance before (accelerate's
    hooks) comes back."""
    own = {
        module: module.__dict__["forward"]
        for module in replacements
        if "forward" in module.__dict__
    }
    try:
        for module, forward in replacements.items():
            module.forward = forward
        yield
    finally:
        for module in replacements:
            module.__dict__.pop("forward", None)
            if module in own:
                module.forward = own[module]
