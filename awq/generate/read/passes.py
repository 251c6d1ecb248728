"""Skeleton passes through a language model: its blocks do nothing, what they are given is noted.

Then all that is left of the model is what surrounds its blocks. `Passes` runs the model in the ways
that tell something about that: at the first positions, at the last, at all of them, with other
tokens, and as `generate` itself calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from awq.errors import ModelError
from awq.generate.plan import NotFusable
from awq.nn.block_calls import BlockCall, cache_argument, run_body
from awq.nn.blocks import BlockList, OneBlock, find_block_lists
from awq.nn.hooks import Call, listening
from awq.nn.norms import is_norm
from awq.nn.reached import reached_lists
from awq.nn.recording import record_block_calls

PIECE = 12  # tokens of one sequence of a skeleton pass

Item = dict[str, Tensor]


@dataclass
class NormCall:
    """A norm that ran outside of the blocks, its input and its output."""

    module: nn.Module
    x: Tensor
    y: Tensor


@dataclass
class Seen:
    """hidden [rows, tokens, features]: what entered the first block. calls[block]: how each block
    was called. norms: what ran beside the blocks. head_x, logits: what entered the head and what
    the model gave, where the head ran."""

    hidden: Tensor
    calls: list[BlockCall]
    norms: list[NormCall]
    head_x: Tensor | None = None
    logits: Tensor | None = None

    @property
    def entrance_norm(self) -> NormCall | None:
        """The norm whose output entered the blocks, if a norm did."""
        return next((call for call in self.norms if torch.equal(call.y, self.hidden)), None)

    @property
    def raw(self) -> Tensor:
        """What entered the blocks, before a norm."""
        norm = self.entrance_norm
        return self.hidden if norm is None else norm.x


@dataclass
class _Notes:
    norms: list[NormCall] = field(default_factory=list)
    head_x: Tensor | None = None
    logits: Tensor | None = None

    def norm(self, call: Call) -> None:
        """A norm beside the blocks ran."""
        x = call.args[0] if call.args else None
        if isinstance(x, Tensor) and isinstance(call.output, Tensor):
            self.norms.append(NormCall(call.module, x, call.output))

    def head(self, call: Call) -> None:
        """The head ran."""
        self.head_x = call.args[0] if call.args else None


class Passes:
    """model: a copy that nobody else runs, since its forwards are replaced for a moment. ids: int64
    [1, PIECE] random tokens."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model = model
        self.ids = ids
        self.head = model.get_output_embeddings()
        self.name, self.blocks = text_blocks(model, ids)
        inside = {module for block in self.blocks for module in block.modules()}
        self.norms = [m for m in model.modules() if is_norm(m) and m not in inside]

    def at(self, places: Tensor, ids: Tensor | None = None, head: bool = False) -> Seen:
        """The pass with the same tokens at other positions in every row: places int64 [rows,
        PIECE]."""
        ids = self.ids if ids is None else ids
        item = {"input_ids": ids.expand(len(places), -1).contiguous(), "position_ids": places}
        return self._run(item, _whole if head else _body)

    def in_a_row(self, tokens: int) -> Seen:
        """The pass over one sequence of `tokens` tokens, the ids over and over, whose positions the
        model counts itself."""
        times = -(-tokens // PIECE)
        return self._run({"input_ids": self.ids.repeat(2, times)[:, :tokens]}, _body)

    def generated(self, padding: int) -> Seen:
        """The pass as transformers' `generate` makes it: two rows, the second with `padding` tokens
        on the left."""
        ids = self.ids.repeat(2, 1)
        mask = torch.ones_like(ids)
        mask[1, :padding] = 0
        item = {"input_ids": ids, "attention_mask": mask}

        try:
            return self._run(item, _generate)
        except NotFusable:  # older releases take the cache off what blocks return
            return self._run(item, partial(_generate, use_cache=False))

    def after(self, past: int) -> Seen:
        """The pass over two rows of tokens that follow `past` cached ones."""
        rows = len(self.ids) + 1
        places = torch.arange(past, past + PIECE, device=self.ids.device).expand(rows, -1)
        cache = _cache_of(past, rows, len(self.blocks), self.ids.device)

        def run(model: Any, item: Item) -> None:
            mask = torch.ones(rows, past + PIECE, dtype=torch.long, device=self.ids.device)
            body = getattr(model, "base_model", model)
            given = {"attention_mask": mask, cache_argument(body.forward): cache}
            body(**item | given, use_cache=True)

        return self._run({"input_ids": self.ids.repeat(rows, 1), "position_ids": places}, run)

    def _run(self, item: Item, run: Callable[[Any, Item], Any]) -> Seen:
        item = {"attention_mask": torch.ones_like(item["input_ids"])} | item
        notes = _Notes()

        def noted(model: Any, item: Item) -> None:
            with listening(self.norms, after=notes.norm), listening([self.head], after=notes.head):
                notes.logits = run(model, item)

        try:
            found = record_block_calls(self.model, [(self.name, self.blocks)], [item], noted)
        except Exception as error:  # someone else's forward, which may fail in any way
            raise NotFusable(
                f"the model's own forward does not run without its blocks: {error}"
            ) from error

        return Seen(found.hidden[0][0], found.calls[0][0], notes.norms, notes.head_x, notes.logits)


def _cache_of(past: int, rows: int, blocks: int, device: torch.device) -> DynamicCache:
    """A cache of full attention that holds `past` tokens for every block, one number each."""
    cache = DynamicCache()
    nothing = torch.zeros(rows, 1, past, 1, dtype=torch.float32, device=device)
    for block in range(blocks):
        cache.update(nothing, nothing, block)
    return cache


def _body(model: Any, item: Item) -> None:
    run_body(model, item)


def _whole(model: Any, item: Item) -> Tensor | None:
    return model(**item, use_cache=False).logits


def _generate(model: Any, item: Item, **options: Any) -> None:
    settings = dict(max_new_tokens=1, do_sample=False, num_beams=1, pad_token_id=0)
    model.generate(**item, **settings, **options)


def text_blocks(model: Any, ids: Tensor) -> BlockList:
    """The one list of blocks that text runs through; towers of other modalities are not reached.

    Raises NotFusable when there is none, or more than one.
    """
    try:
        lists = find_block_lists(model)
        if len(lists) > 1:
            item = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            lists = reached_lists(model, lists, item)
    except ModelError as error:
        raise NotFusable(str(error)) from error

    reads_more = any(isinstance(blocks, OneBlock) for _, blocks in lists)
    if reads_more:
        raise NotFusable(f"{lists[0][0]}: a block reads more than the block before it gives")
    if len(lists) != 1:
        names = ", ".join(name for name, _ in lists)
        raise NotFusable(f"text runs through {len(lists)} lists of blocks: {names}")
    return lists[0]
