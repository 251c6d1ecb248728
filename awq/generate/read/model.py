"""What surrounds the blocks of a language model, measured on skeleton passes (`awq.nn.blocks`), in
which blocks do nothing.

Then the logits are a function of the embeddings alone, and the rotary tables and absolute positions
of every place in the sequence can be read off, because they are what the blocks are given.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awq.errors import ModelError
from awq.generate.plan import Norm, NotFusable
from awq.generate.read.trace import rotary_tables
from awq.nn.blocks import BlockCall, find_block_lists, record_block_calls
from awq.nn.hooks import Call, listening
from awq.nn.norms import is_norm, read_norm
from awq.nn.surgery import get_weight

PIECE = 12  # tokens of one sequence of a skeleton pass


@dataclass
class ModelFrame:
    """name, blocks: the list of blocks and its modules. near, far: how each block is called at the
    first and last positions.

    tables[block]: keyword → (cos, sin) float32 [positions, …] over all positions.
    """

    name: str
    blocks: list[nn.Module]
    near: list[BlockCall]
    far: list[BlockCall]
    tables: list[dict[str, tuple[Tensor, Tensor]]]
    width: int
    embedding_factor: float
    positions: Tensor | None
    norm: Norm | None
    logits_factor: float
    logits_softcap: float | None


@torch.no_grad()
def read_model(model: Any, max_seq_len: int) -> ModelFrame:
    """Raises NotFusable when the model's surroundings are of a kind that is not known here.

    model: a copy that nobody else runs, since its forwards are replaced for a moment.
    """
    try:
        lists = find_block_lists(model)
    except ModelError as error:
        raise NotFusable(str(error)) from error
    if len(lists) != 1:
        raise NotFusable(
            f"the model has {len(lists)} lists of blocks: {', '.join(name for name, _ in lists)}"
        )
    blocks = list(lists[0][1])
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not isinstance(embedding, nn.Module):
        raise NotFusable("the model has no embedding or no head")
    pieces = -(-max_seq_len // PIECE)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    vocabulary = get_weight(embedding).shape[0]
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (1, PIECE), generator=generator).to(
        device
    )
    places = (torch.arange(pieces * PIECE, device=device) % max(max_seq_len, PIECE)).view(
        pieces, PIECE
    )
    heads = _HeadCalls(head)
    # of two rows, so that no call looks like packed sequences
    one = {"input_ids": ids.expand(2, -1).contiguous()}
    near = _skeleton(
        model, lists, one | {"position_ids": places[:1].expand(2, -1).contiguous()}, heads
    )
    logits = heads.logits
    far = _skeleton(
        model, lists, one | {"position_ids": places[-1:].expand(2, -1).contiguous()}, None
    )
    everywhere = _skeleton(
        model,
        lists,
        {"input_ids": ids.expand(pieces, -1).contiguous(), "position_ids": places},
        None,
    )
    tables = [_tables(call, pieces * PIECE) for call in everywhere.calls[0][0]]
    _check_tables(tables, near.calls[0][0], "the first")
    hidden = everywhere.hidden[0][0]
    others = {name: (t.roll(1, 1) if name == "input_ids" else t) for name, t in one.items()}
    changed = _skeleton(
        model, lists, others | {"position_ids": places[:1].expand(2, -1).contiguous()}, None
    ).hidden[0][0]
    factor, positions = _embedding(embedding, ids, hidden, changed[0])
    final = _head(model, heads, near.hidden[0][0], logits)
    return ModelFrame(
        lists[0][0],
        blocks,
        near.calls[0][0],
        far.calls[0][0],
        tables,
        hidden.shape[-1],
        factor,
        positions,
        *final,
    )


class _HeadCalls:
    """Notes what enters and leaves the norms and the head during one pass."""

    def __init__(self, head: nn.Module) -> None:
        self.head, self.norms, self.x = head, [], None  # type: ignore[var-annotated]
        self.logits: Tensor | None = None

    def run(self, model: Any, item: dict[str, Tensor]) -> None:
        norms = [module for module in model.modules() if is_norm(module)]
        with listening(norms, after=self._note), listening([self.head], after=self._note_head):
            self.logits = model(**item, use_cache=False).logits

    def _note(self, call: Call) -> None:
        x = call.args[0] if call.args else None
        if isinstance(x, Tensor) and isinstance(call.output, Tensor):
            self.norms.append((call.module, x, call.output))

    def _note_head(self, call: Call) -> None:
        self.x = call.args[0]


def _skeleton(
    model: Any, lists: Sequence, item: dict[str, Tensor], heads: _HeadCalls | None
) -> Any:
    item = item | {"attention_mask": torch.ones_like(item["input_ids"])}
    try:
        return record_block_calls(model, lists, [item], heads.run if heads else None)
    except (ModelError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise NotFusable(
            f"the model's own forward does not run without its blocks: {error}"
        ) from error


def _tables(call: BlockCall, positions: int) -> dict[str, tuple[Tensor, Tensor]]:
    """[pieces, PIECE, r] or [1, …] → [positions, r] in float32."""
    found = {}
    for name, (cos, sin) in rotary_tables(call).items():
        if cos.numel() // cos.shape[-1] != positions:
            raise NotFusable("rotary tables are not made for the positions that the model is given")
        found[name] = (cos.float().reshape(positions, -1), sin.float().reshape(positions, -1))
    return found


def _check_tables(tables: list[dict], calls: list[BlockCall], what: str) -> None:
    """The tables of the first positions must not depend on how long the sequence is (dynamic and
    long rotary scaling do)."""
    for known, call in zip(tables, calls):
        for name, (cos, sin) in rotary_tables(call).items():
            short = (cos[:1].float().reshape(PIECE, -1), sin[:1].float().reshape(PIECE, -1))
            if name not in known or not all(
                torch.equal(a[:PIECE], b) for a, b in zip(known[name], short)
            ):
                raise NotFusable(
                    f"rotary tables of {what} positions depend on the length of the sequence"
                )


def _embedding(
    embedding: nn.Module, ids: Tensor, hidden: Tensor, changed: Tensor
) -> tuple[float, Tensor | None]:
    """Factor and absolute positions in hidden [pieces, PIECE, features] = factor · E[ids] +
    P[position].

    changed: hidden [PIECE, features] of the first piece's positions with the ids rolled by one.
    """
    vectors = embedding(ids)[0].float()
    if vectors.shape != hidden.shape[1:]:
        raise NotFusable("the embedding's width is not the blocks'")
    rounding = 4 * torch.finfo(hidden.dtype).eps
    factor, slack = (
        _multiple(hidden[0].float(), vectors),
        rounding * float(hidden[0].float().abs().mean()),
    )
    expected = factor * vectors
    if all(
        torch.allclose(h, expected.expand_as(h), rtol=rounding, atol=slack)
        for h in map(Tensor.float, hidden.split(64))
    ):
        return (1.0 if abs(factor - 1) < rounding else factor), None
    if len(hidden) > 1 and torch.equal(hidden[0], hidden[1]):
        raise NotFusable("absolute positions are not taken from position_ids")
    # Positions do not change with the ids, so the difference tells the factor, and the rest is
    # theirs.
    factor = _multiple(hidden[0].float() - changed.float(), vectors - vectors.roll(1, 0))
    factor = 1.0 if abs(factor - 1) < rounding else factor
    positions = hidden.float() - factor * vectors
    if not torch.allclose(
        changed.float() - factor * vectors.roll(1, 0), positions[0], rtol=rounding, atol=4 * slack
    ):
        raise NotFusable(
            "what enters the blocks is not a multiple of the embedding and a vector for each "
            "position"
        )
    return factor, positions.flatten(0, 1)


def _multiple(values: Tensor, of: Tensor) -> float:
    """The f that fits values = f · of best."""
    return float((values * of).sum() / of.square().sum().clamp(min=1e-30))


def _head(
    model: Any, heads: _HeadCalls, hidden: Tensor, logits: Tensor | None
) -> tuple[Norm | None, float, float | None]:
    """The final norm, and factor and soft cap in logits = cap · tanh(factor · head(norm(x)) /
    cap)."""
    if heads.x is None or logits is None:
        raise NotFusable("the model gives no logits")
    norm = None
    if not torch.equal(heads.x, hidden):
        event = next(
            (
                e
                for e in reversed(heads.norms)
                if torch.equal(e[2], heads.x) and torch.equal(e[1], hidden)
            ),
            None,
        )
        if event is None:
            raise NotFusable("between the last block and the head there is more than a norm")
        norm = _final_norm(event[0], event[1])
    plain = heads.head(heads.x).float()
    logits = logits.float()
    if not bool(logits.isfinite().all()):
        raise NotFusable("the head gives logits that are not finite")
    factor = float((plain * logits).sum() / plain.square().sum().clamp(min=1e-30))
    tolerance = 1e-5 if hidden.dtype == torch.float32 else 4 * torch.finfo(hidden.dtype).eps
    if torch.allclose(
        logits, factor * plain, rtol=tolerance, atol=tolerance * float(logits.abs().max())
    ):
        return norm, (1.0 if abs(factor - 1) < 1e-4 else factor), None
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap and torch.allclose(
        logits, cap * torch.tanh(plain / cap), rtol=tolerance, atol=tolerance * cap
    ):
        return norm, 1.0, float(cap)
    raise NotFusable("the logits are neither the head's output nor a multiple of it")


def _final_norm(module: nn.Module, x: Tensor) -> Norm:
    module = copy.deepcopy(module).float()
    norm = read_norm(module, x.float(), module(x.float()))
    if norm is None:
        raise NotFusable("the final norm is of a kind that is not known here")
    return norm
