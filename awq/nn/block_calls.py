"""What a model's forward gives one of its blocks, and running a block or the model's body with it.

A transformers model calls each block with its own arguments (masks, rotary tables: some models give
every layer different ones). `BlockCall` holds them without the hidden states.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awq.errors import ModelError

CACHES = ("past_key_values", "past_key_value", "layer_past", "past", "cache", "cache_params")
_FLAGS = {"use_cache": False, "output_attentions": False}


def cache_argument(forward: Callable) -> str:
    """The name by which a model's forward takes its cache: transformers 5.24 renamed it, and warns
    of the older one."""
    if "cache" in inspect.signature(forward).parameters:
        return "cache"
    return "past_key_values"


def takes_a_cache(forward: Callable) -> bool:
    """Whether a model's forward knows of a cache, whatever its class."""
    return not {"use_cache", *CACHES}.isdisjoint(inspect.signature(forward).parameters)


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
        return hidden_of(self.outputs(block, hidden))

    def outputs(self, block: nn.Module, hidden: Tensor) -> Any:
        """All that the block gives."""
        if self.where is None:
            return block(hidden, *self.args, **self.kwargs)
        return block(*self.args, **{self.where: hidden, **self.kwargs})

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> BlockCall:
        """The same call with tensors on `device`, floating ones as `dtype`."""

        def move(t: Tensor) -> Tensor:
            if dtype is not None and t.is_floating_point():
                return t.to(device, dtype)
            return t.to(device)

        return BlockCall(map_tensors(self.args, move), map_tensors(self.kwargs, move), self.where)


def split_call(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """Separates the hidden states [batch, tokens, features] from a block's other arguments, and
    drops caches."""
    kept = {
        key: value for key, value in kwargs.items() if key not in CACHES and not _is_cache(value)
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


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a module's output: the tensor itself or what comes first in a tuple (of
    tuples, as LiLT's layers gave before transformers 5)."""
    while isinstance(output, (tuple, list)):
        output = output[0]
    return output


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Applies `change` to every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        mapped = [map_tensors(v, change) for v in value]
        if type(value) in (tuple, list):
            return type(value)(mapped)
        return type(value)(*mapped)
    if type(value) is dict:
        return {k: map_tensors(v, change) for k, v in value.items()}
    return value


def run_body(model: nn.Module, item: dict[str, Tensor]) -> None:
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
