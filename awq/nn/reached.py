"""Which lists of blocks a model's forward runs, in which order, and whether their blocks form a
chain."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from awq.nn.block_calls import BlockCall, hidden_of, map_tensors, run_body, split_call
from awq.nn.blocks import BlockList, OneBlock, block_names
from awq.nn.hooks import Call, listening
from awq.nn.recording import record_block_calls, short_inputs

logger = logging.getLogger("awq.nn")

_SAME = 0.01  # relative, of hidden states in any dtype


@torch.no_grad()
def reached_lists(
    model: nn.Module,
    lists: Sequence[BlockList],
    item: dict[str, Tensor],
) -> list[BlockList]:
    """The lists whose blocks all run when the model is called with `item`, in the order in which
    they begin.

    A vision tower does not run on text. An encoder begins before its decoder, wherever it is
    registered. A list whose blocks do not read just what the block before them gives comes as
    single blocks. Raises ModelError when the model's forward fails.
    """
    short = short_inputs(item)
    names = [name for entry in lists for name in block_names(entry)]
    seen = _observed(model, names, short)
    order = {name: place for place, name in enumerate(seen)}

    reached: list[BlockList] = []
    for entry in lists:
        own = block_names(entry)
        if not all(name in seen for name in own):
            continue

        prefix, blocks = entry
        if len(blocks) < 2 or _is_chain(model, entry, short, [seen[name] for name in own]):
            reached.append(entry)
        else:
            reached += [(prefix, OneBlock(block, i)) for i, block in enumerate(blocks)]

    return sorted(reached, key=lambda entry: order[block_names(entry)[0]])


@dataclass
class _Observed:
    """A block's first call in a true pass: its input, other arguments and output; how many calls
    there were."""

    hidden: Tensor
    call: BlockCall
    output: Any = None
    calls: int = 1


def _observed(
    model: nn.Module,
    names: Sequence[str],
    item: dict[str, Tensor],
) -> dict[str, _Observed]:
    """Name → what was seen of a block that runs, in the order of first calls."""
    seen: dict[str, _Observed] = {}

    def before(name: str, call: Call) -> None:
        if name in seen:
            seen[name].calls += 1
        else:
            hidden, others = split_call(call.args, call.kwargs)
            seen[name] = _Observed(hidden.clone(), others)

    def after(name: str, call: Call) -> None:
        first = seen[name]
        if first.output is None:
            first.output = map_tensors(hidden_of(call.output), torch.clone)

    with ExitStack() as stack:
        for name in names:  # two names may mean the same module
            block = model.get_submodule(name)
            watched = listening([block], partial(before, name), partial(after, name))
            stack.enter_context(watched)
        run_body(model, item)

    return seen


def _is_chain(
    model: nn.Module,
    entry: BlockList,
    item: dict[str, Tensor],
    seen: Sequence[_Observed],
) -> bool:
    """Whether each block reads what the one before it gives, and a skeleton pass knows its other
    arguments.

    Some models put other layers between their blocks (XLM), or hand more than hidden states on from
    block to block (LiLT, Pegasus-X). Blocks that run several times are not asked.
    """
    if seen[0].hidden.is_meta or any(block.calls > 1 for block in seen):
        return True
    try:
        recorded = record_block_calls(model, [entry], [item]).calls[0][0]
        for i, (block, call, true) in enumerate(zip(entry[1], recorded, seen)):
            if i and not _close(true.hidden, seen[i - 1].output):
                return False
            if not _alike(call, true.call):
                return False
            call.run(block, true.hidden)  # may lack what an earlier block would give
        return True
    except Exception as error:  # of anybody's block, called without what it needs
        logger.info("%s: its blocks run one by one: %s", entry[0], error)
        return False


def _close(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    return float((a - b).float().norm()) <= _SAME * float(b.float().norm())


def _alike(call: BlockCall, true: BlockCall) -> bool:
    """Whether all floating tensors that the true call is given are the same in the other."""
    pairs = list(zip(call.args, true.args))
    for key, value in call.kwargs.items():
        pairs.append((value, true.kwargs.get(key)))
    for given, wanted in pairs:
        if not _is_floating(wanted):
            continue
        if not _is_floating(given):
            return False  # made by an earlier block, as T5's first one makes the bias of all
        # masks hold infinities
        if not _close(given.nan_to_num(), wanted.nan_to_num()):
            return False

    return True


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
