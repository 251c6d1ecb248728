"""The folds of a whole model, without quantizing it: for `awq folds` and for reading.

Folds are a property of the computation, not of the text, so random token ids serve and no tokenizer
is needed. Costs one forward of a few short rows plus discovery on every block whose structure is
new.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from awq.folds.discovery import discover
from awq.folds.fold import InputGroup
from awq.folds.proof import prove
from awq.nn.blocks import find_block_lists
from awq.nn.decoder_inputs import with_decoder_inputs
from awq.nn.reached import reached_lists
from awq.nn.walk import ONE_TOKEN_ROWS, PROBE_TOKENS, BlockWalk


@torch.no_grad()
def find_folds(model: nn.Module, seed: int = 0) -> Iterator[tuple[str, list[InputGroup]]]:
    """(block name, its input groups with proven folds) for every repeated block, in order.

    model: a full-precision transformers model; it is not changed. The probes have the size of those
    that `quantize_model` proves folds on. Raises ModelError when the model has no repeated blocks.

    >>> name, groups = next(find_folds(model))
    >>> groups[0].consumers
    ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj')
    >>> name, groups[0].fold.producer
    ('model.layers.0', 'input_layernorm')
    """
    model.eval()
    inputs = _random_inputs(model, seed)
    lists = reached_lists(model, find_block_lists(model), with_decoder_inputs(model, inputs))
    for visit in BlockWalk(model, lists, [inputs]):
        generator = torch.Generator().manual_seed(seed)
        groups = discover(visit.block, visit.single, visit.many, generator)
        yield visit.name, prove(visit.block, groups, visit.many, generator)


def _random_inputs(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random ids, int64 [ONE_TOKEN_ROWS, PROBE_TOKENS], without the padding id: encoders number
    their positions by it."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    pad = getattr(model.config, "pad_token_id", None)
    known = torch.arange(embedding.num_embeddings)
    known = known if pad is None else known[known != pad]
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(0, len(known), (ONE_TOKEN_ROWS, PROBE_TOKENS), generator=generator)
    ids = known[picked].to(embedding.weight.device)

    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
