"""How a model calls its blocks, recorded.

In a *skeleton pass* every block is replaced by a stub that notes its arguments and hands its hidden
states on unchanged, so recording costs an embedding lookup, not a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awq.errors import ModelError
from awq.nn.block_calls import BlockCall, replaced_forwards, run_body, split_call
from awq.nn.blocks import BlockList
from awq.nn.hooks import hooked

# [rows, tokens]; a decoder's, too
_TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_SHORT_TOKENS = 16  # of a true pass that only shows what runs, and what it returns


@dataclass
class BlockCalls:
    """calls[list][input][block] and hidden[list][input]: what enters the first block of each
    list."""

    calls: list[list[list[BlockCall]]]
    hidden: list[list[Tensor]]


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
            (run or run_body)(model, item)
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


@torch.no_grad()
def record_one_block(
    model: nn.Module,
    name: str,
    inputs: Sequence[dict[str, Tensor]],
) -> tuple[list[BlockCall], list[Tensor]]:
    """(arguments, hidden states) of one block's first call for each input; all before it runs.

    Raises ModelError like `record_block_calls`.
    """
    calls = []
    entering = []
    for item in inputs:
        seen: list[tuple[Tensor, BlockCall]] = []

        def note(*args: Any, **kwargs: Any) -> None:
            seen.append(split_call(args, kwargs))
            raise _Reached

        with replaced_forwards({model.get_submodule(name): note}), suppress(_Reached):
            run_body(model, item)
        if not seen:
            raise ModelError(f"{name} is never called by the model's forward; it stays unknown.")

        entering.append(seen[0][0].detach())
        calls.append(seen[0][1])

    return calls, entering


class _Reached(Exception):
    """Ends a forward whose rest is of no use."""


def _stub(seen: dict, key: tuple[int, int], wrap: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """A forward that notes its arguments in `seen` and hands the hidden states on."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, call = split_call(args, kwargs)
        seen[key] = hidden, call
        return wrap(hidden)

    return forward


def _output_structures(
    model: nn.Module,
    lists: Sequence[BlockList],
    item: dict[str, Tensor],
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
        run_body(model, short_inputs(item))
    return wraps


def short_inputs(item: dict[str, Tensor]) -> dict[str, Tensor]:
    """The beginning of the first row of a model's inputs, without padding; all, where images or
    sound stand beside the tokens: their first axis counts patches, and ids stand for each."""
    if not all(name.endswith(_TOKEN_INPUTS) for name in item):
        return item

    short = {}
    for name, tensor in item.items():
        row = tensor[:1, :_SHORT_TOKENS]
        short[name] = torch.ones_like(row) if name.endswith("attention_mask") else row

    return short


def _as_it_is(hidden: Tensor) -> Tensor:
    return hidden
