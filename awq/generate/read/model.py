"""What surrounds the blocks of a language model, measured on skeleton passes (`passes`), in which
blocks do nothing.

Then the logits are a function of the embeddings alone, and the rotary tables and absolute positions
of every place in the sequence can be read off, because they are what the blocks are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awq.generate.plan import Norm, NotFusable
from awq.generate.read.entrance import Entrance, read_entrance, read_outer_norm
from awq.generate.read.masks import read_windows
from awq.generate.read.passes import PIECE as PIECE
from awq.generate.read.passes import NormCall, Passes, Seen
from awq.generate.read.trace import rotary_tables
from awq.nn.block_calls import BlockCall
from awq.nn.surgery import get_weight


@dataclass
class ModelFrame:
    """name, blocks: the list of blocks and its modules. near, far: how each block is called at the
    first and last positions; everywhere: at all of them, PIECE in a row.

    tables[block]: keyword → (cos, sin) float32 [positions, …] over all positions. changed: how each
    block is called for other tokens at the first positions. windows: see `masks`.
    """

    name: str
    blocks: list[nn.Module]
    near: list[BlockCall]
    far: list[BlockCall]
    everywhere: list[BlockCall]
    changed: list[BlockCall]
    tables: list[dict[str, tuple[Tensor, Tensor]]]
    windows: dict[int, int | None]
    width: int
    entrance: Entrance
    norm: Norm | None
    logits_factor: float
    logits_softcap: float | None


@torch.no_grad()
def read_model(model: Any, max_seq_len: int) -> ModelFrame:
    """Raises NotFusable when the model's surroundings are of a kind that is not known here.

    model: a copy that nobody else runs, since its forwards are replaced for a moment.
    """
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if head is None or not isinstance(embedding, nn.Module):
        raise NotFusable("the model has no embedding or no head")

    ids = _random_ids(embedding, next(model.parameters()).device)
    passes = Passes(model, ids)
    places = _places(max_seq_len, ids.device)

    # of two rows, so that no call looks like packed sequences
    near = passes.at(places[:1].expand(2, -1).contiguous(), head=True)
    far = passes.at(places[-1:].expand(2, -1).contiguous())
    everywhere = passes.at(places)
    tables = [_tables(call, places.numel()) for call in everywhere.calls]
    _check_tables(tables, near.calls, "the first")
    changed = passes.at(places[:1].expand(2, -1).contiguous(), ids.roll(1, 1))

    return ModelFrame(
        passes.name,
        list(passes.blocks),
        near.calls,
        far.calls,
        everywhere.calls,
        changed.calls,
        tables,
        read_windows(passes, max_seq_len),
        everywhere.hidden.shape[-1],
        read_entrance(passes, embedding, everywhere, changed, max_seq_len),
        *_head(model, near),
    )


def _random_ids(embedding: nn.Module, device: torch.device) -> Tensor:
    """int64 [1, PIECE]"""
    generator = torch.Generator().manual_seed(0)
    vocabulary = get_weight(embedding).shape[0]
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (1, PIECE), generator=generator)
    return ids.to(device)


def _places(max_seq_len: int, device: torch.device) -> Tensor:
    """int64 [pieces, PIECE]: all positions."""
    pieces = -(-max_seq_len // PIECE)
    places = torch.arange(pieces * PIECE, device=device) % max(max_seq_len, PIECE)
    return places.view(pieces, PIECE)


def _tables(call: BlockCall, positions: int) -> dict[str, tuple[Tensor, Tensor]]:
    """[pieces, PIECE, r] or [1, …] → [positions, r] in float32."""
    found = {}
    for name, (cos, sin) in rotary_tables(call).items():
        rows = cos.numel() // cos.shape[-1]
        if rows != positions:
            raise NotFusable("rotary tables are not made for the positions that the model is given")

        whole_cos = cos.float().reshape(positions, -1)
        whole_sin = sin.float().reshape(positions, -1)
        found[name] = whole_cos, whole_sin
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


def _head(model: Any, near: Seen) -> tuple[Norm | None, float, float | None]:
    """The final norm, and factor and soft cap in logits = cap · tanh(factor · head(norm(x)) /
    cap)."""
    hidden = near.hidden
    x = near.head_x
    logits = near.logits
    if x is None or logits is None:
        raise NotFusable("the model gives no logits")

    norm, before_head = _final_norm(near, hidden, x)
    plain = model.get_output_embeddings()(x).float()
    logits = logits.float()
    if not bool(logits.isfinite().all()):
        raise NotFusable("the head gives logits that are not finite")

    factor = float((plain * logits).sum() / plain.square().sum().clamp(min=1e-30))
    tolerance = 1e-5 if hidden.dtype == torch.float32 else 4 * torch.finfo(hidden.dtype).eps
    if torch.allclose(
        logits, factor * plain, rtol=tolerance, atol=tolerance * float(logits.abs().max())
    ):
        factor *= before_head
        return norm, (1.0 if abs(factor - 1) < 1e-4 else factor), None

    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap and torch.allclose(
        logits, cap * torch.tanh(plain / cap), rtol=tolerance, atol=tolerance * cap
    ):
        return norm, before_head, float(cap)
    raise NotFusable("the logits are neither the head's output nor a multiple of it")


def _final_norm(near: Seen, hidden: Tensor, x: Tensor) -> tuple[Norm | None, float]:
    """(the norm between the last block and the head, what its output is multiplied by) for what
    leaves the blocks and what enters the head."""
    candidates: list[tuple[NormCall | None, Tensor]] = [(None, hidden)]
    candidates += [(call, call.y) for call in near.norms if torch.equal(call.x, hidden)]
    for call, y in candidates:
        if torch.equal(x, y):
            return read_outer_norm(call), 1.0

    rounding = 4 * torch.finfo(hidden.dtype).eps
    for call, y in candidates:
        factor = float((x.float() * y.float()).sum() / y.float().square().sum().clamp(min=1e-30))
        if torch.allclose(
            x.float(),
            factor * y.float(),
            rtol=rounding,
            atol=rounding * float(x.float().abs().max()),
        ):
            return read_outer_norm(call), factor

    raise NotFusable("between the last block and the head there is more than a norm")
