"""What stands around an encoder's blocks: the embeddings that are summed before them, a bias by
distance, and the norm after them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awq.embed.observe import Event, NotReadable, near, norm_of
from awq.kernels.specs import Norm
from awq.nn.norms import is_norm


@dataclass(frozen=True)
class Tables:
    """positions, types: float32 [entries, hidden], or None. words_factor: what rows of words are
    multiplied by. position_offset: index of the first token's row. norm: of the sum, if it has one.
    """

    words_factor: float
    positions: Tensor | None
    position_offset: int
    types: Tensor | None
    norm: Norm | None


def read_tables(words: nn.Module, events: list[Event], given: Tensor, tokens: int) -> Tables:
    """The embeddings whose sum the first block is given. Raises NotReadable.

    words: the embedding of tokens. events: calls outside of the blocks, for a row of `tokens`
    tokens. given: what the first block reads, [1, tokens, hidden].
    """
    first = next(event for event in events if event.module is words)
    positions: Tensor | None = None
    types: Tensor | None = None
    offset = 0
    total = first.y.float()

    for event in events:
        if not _is_summed(event, words):
            continue

        module: Any = event.module
        table = module.weight.detach().float()
        rows = event.x.reshape(-1)[-tokens:]
        if len(rows) == tokens and torch.equal(rows - rows[0], torch.arange(tokens)):
            positions = table
            offset = int(rows[0])
        elif not rows.any():
            types = table
        else:
            raise NotReadable(
                "it adds an embedding that depends on more than word, position and type"
            )

        total = total + event.y.float()

    norm = _norm_of_sum(events, total, given)
    return Tables(_words_factor(first), positions, offset, types, norm)


def _is_summed(event: Event, words: nn.Module) -> bool:
    """Whether a call looks up vectors as wide as those of words."""
    module = event.module
    if not isinstance(module, nn.Embedding) or module is words:
        return False
    return module.embedding_dim == words.embedding_dim


def _norm_of_sum(events: list[Event], total: Tensor, given: Tensor) -> Norm | None:
    """The norm between the sum of the embeddings and the first block."""
    norms = [event for event in events if is_norm(event.module) and near(event.y, given)]
    if not norms:
        if not near(total, given.float()):
            raise NotReadable("what its first block reads is not the sum of its embeddings")
        return None

    read = norms[0].x.float()
    if not near(total.expand_as(read), read):
        raise NotReadable("what its first norm reads is not the sum of its embeddings")
    return norm_of(norms[0])


def _words_factor(event: Event) -> float:
    """What an embedding multiplies its rows by. Raises NotReadable when it does something else."""
    module: Any = event.module
    rows = module.weight[event.x].double()
    made = event.y.double()
    factor = float((made * rows).sum() / rows.square().sum().clamp(min=1e-30))
    if not near(factor * rows, made):
        raise NotReadable("its embedding gives something else than multiples of its rows")
    return 1.0 if abs(factor - 1) < 1e-3 else factor


def final_norm(events: list[Event], made: Tensor, last: Tensor, pre_norm: bool) -> Norm | None:
    """The norm between what the last block made and what the encoder gives, if there is one.

    Raises NotReadable where anything else lies between them.
    """
    for event in events:
        if pre_norm and is_norm(event.module) and near(event.x, made) and near(event.y, last):
            return norm_of(event)

    if near(made, last):
        return None
    raise NotReadable("something lies between its last block and what it gives")


def relative_bias(model: Any, heads: int) -> Tensor | None:
    """float32 [heads, 2·n − 1] of a bias that depends on the distance of two tokens, or None."""
    tables = [
        m
        for m in model.modules()
        if isinstance(m, nn.Embedding)
        and m.embedding_dim == heads
        and m is not model.get_input_embeddings()
    ]
    if not tables:
        return None

    owner = next(m for m in model.modules() if any(child is tables[0] for child in m.children()))
    compute: Any = getattr(owner, "compute_position_bias", None)
    longest = min(int(getattr(model.config, "max_position_embeddings", 512)), 2048)
    if compute is None:
        raise NotReadable("it adds a bias to attention whose table nobody reads here")

    whole = compute(torch.zeros(1, longest, 1, dtype=tables[0].weight.dtype))[0].float()
    return torch.cat([whole[:, 1:, 0].flip(1), whole[:, 0, :]], 1).contiguous()
