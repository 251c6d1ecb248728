"""The folds of a whole model, without quantizing it: for `awq folds` and for reading.

Folds are a property of the computation, not of the text, so random token ids serve and no tokenizer is needed. Costs one
forward of a few short rows plus discovery on every block whose structure is new.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from awq.folds.discovery import discover
from awq.folds.fold import InputGroup
from awq.folds.proof import prove
from awq.nn.blocks import find_block_lists, record_block_calls

ROWS, LENGTH = 2, 16  # sequences of the proof
SINGLES = 64  # one-token sequences that map producer rows to channels


@torch.no_grad()
def survey(model: nn.Module, seed: int = 0) -> Iterator[tuple[str, list[InputGroup]]]:
    """(block name, its input groups with proven folds) for every repeated block, in order.

    model: a full-precision transformers model; it is not changed. Raises ModelError when it has no repeated blocks.
    """
    model.eval()
    lists = find_block_lists(model)
    generator = torch.Generator().manual_seed(seed)
    inputs = [_inputs(model, rows, length, generator) for rows, length in ((ROWS, LENGTH), (SINGLES, 1))]
    many, single = (record_block_calls(model, lists, [item]) for item in inputs)
    for i, (prefix, blocks) in enumerate(lists):
        hidden, hidden_single = many.hidden[i][0], single.hidden[i][0]
        for j, block in enumerate(blocks):
            calls = [(many.calls[i][0][j], hidden)]
            calls_single = [(single.calls[i][0][j], hidden_single)]
            yield f"{prefix}.{j}", prove(block, discover(block, calls_single, calls), calls)
            hidden, hidden_single = calls[0][0].run(block, hidden), calls_single[0][0].run(block, hidden_single)


def _inputs(model: nn.Module, rows: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random ids, int64 [rows, length], without the padding id: encoders number their positions by it."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    pad = getattr(model.config, "pad_token_id", None)
    ids = torch.arange(embedding.num_embeddings)
    ids = ids if pad is None else ids[ids != pad]
    picked = ids[torch.randint(0, len(ids), (rows, length), generator=generator)].to(embedding.weight.device)
    return {"input_ids": picked, "attention_mask": torch.ones_like(picked)}
