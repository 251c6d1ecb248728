"""Which keys the attention of each block sees, read off the masks that the model itself makes for
the last tokens of a full cache.

Blocks are read and proven on a few tokens at a time. A window or a chunk of 4,096 tokens shows
nowhere there, and some models tell it to their mask alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from awq.generate.plan import NotFusable
from awq.generate.read.passes import PIECE, Passes
from awq.kernels.reference.attention import causal_mask
from awq.nn.block_calls import BlockCall

MASKED = -1e4  # what is added to a score that is not to count is below


def read_windows(passes: Passes, max_seq_len: int) -> dict[int, int | None]:
    """Block → how many of the last tokens it sees, the present one included; None: all of them.

    A block whose mask is not known is left out. Raises NotFusable for a mask of another kind, and
    where transformers' cache drops keys that the mask shows.
    """
    masks = _masks(passes, max_seq_len)
    check_cache(passes.model, masks, max_seq_len)
    return {block: _window(mask) for block, mask in masks.items()}


def read_masks(model: Any, ids: Tensor, max_seq_len: int) -> dict[int, Tensor]:
    """Block → which keys the last tokens of a full cache see, bool [tokens, keys], where that is
    known.

    model: a copy that nobody else runs. ids: int64 [1, PIECE]. Raises NotFusable.
    """
    return _masks(Passes(model, ids), max_seq_len)


def check_cache(model: Any, masks: dict[int, Tensor], max_seq_len: int) -> None:
    """Raises NotFusable where the cache of transformers' `generate` forgets tokens that a mask
    shows: the steps after a long prompt then see less than the prompt did (Moshi)."""
    try:
        layers = DynamicCache(config=model.config.get_text_config()).layers
    except (TypeError, ValueError, KeyError, AttributeError):
        return  # before 4.56; or a cache of a kind of its own
    for block, layer in enumerate(layers):
        window = getattr(layer, "sliding_window", None)
        if window is None or window >= max_seq_len or block not in masks:
            continue
        if int(masks[block][-1].sum()) > window:
            raise NotFusable("transformers' cache forgets tokens that the mask shows")


def _masks(passes: Passes, max_seq_len: int) -> dict[int, Tensor]:
    if max_seq_len <= PIECE:
        return {}

    try:
        calls = passes.after(max_seq_len - PIECE).calls
    except NotFusable:  # an older release, or a cache of a kind of its own
        return {}

    masks = ((block, _mask_of(call, max_seq_len)) for block, call in enumerate(calls))
    return {block: mask for block, mask in masks if mask is not None}


def _mask_of(call: BlockCall, keys: int) -> Tensor | None:
    """bool [tokens, keys] of the first row."""
    for value in _tensors((call.args, call.kwargs)):
        if value.dim() != 4 or value.shape[-2:] != (PIECE, keys):
            continue
        seen = value if value.dtype == torch.bool else value > MASKED
        return seen[0, 0]
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)


def _window(seen: Tensor) -> int | None:
    tokens, keys = seen.shape
    count = int(seen[-1].sum())
    window = None if count == keys else count
    if not torch.equal(seen, causal_mask(tokens, keys, window, seen.device)):
        raise NotFusable("attention sees other keys than a number of the last ones")
    return window
