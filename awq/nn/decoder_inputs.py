"""What models read beside a text: an encoder-decoder's decoder needs something to read, and some
ids stand for images or sound.

Calibration data holds texts, and most users have no pairs of a source and its target. The decoder
then reads the text itself, shifted by its start token, as it would when it is trained to repeat its
input. That is natural text behind a natural cross-attention; pairs of the user's own task are
better, and stay as they are.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

_PLACEHOLDER = re.compile(r"(image|video|audio|vision|speech|img).*(id|index)$")


def with_decoder_inputs(model: nn.Module, item: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's inputs with `decoder_input_ids` and `decoder_attention_mask`, where it takes them
    and they are lacking.

    item: `input_ids` and `attention_mask` [rows, tokens], and others. The decoder's rows are one
    token shorter, so that the mask of either side can be told by its shape; rows of a single token
    stay what they are, as probes want them.
    """
    if not takes_decoder_inputs(model) or "decoder_input_ids" in item:
        return item

    ids = item["input_ids"]
    mask = item["attention_mask"]
    if ids.shape[1] > 1:
        start = torch.full_like(ids[:, :1], start_token(model))
        kept = max(0, ids.shape[1] - 2)
        ids = torch.cat([start, ids[:, :kept]], 1)
        mask = torch.cat([torch.ones_like(start), mask[:, :kept]], 1)

    return {**item, "decoder_input_ids": ids, "decoder_attention_mask": mask}


def takes_decoder_inputs(model: nn.Module) -> bool:
    """Whether a model is a whole encoder-decoder, not the encoder of one."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    names = inspect.signature(model.forward).parameters
    return "decoder_input_ids" in names and "input_ids" in names


def start_token(model: nn.Module) -> int:
    """The id that a decoder begins with."""
    for config in (getattr(model, "generation_config", None), model.config):
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            value: Any = getattr(config, name, None)
            if isinstance(value, int) and value >= 0:
                return value
    return 0


def placeholder_ids(model: Any) -> set[int]:
    """Token ids that stand for images or sound, by the model's config."""
    config = getattr(model, "config", None)
    configs = [c for c in (config, getattr(config, "text_config", None)) if c is not None]
    found = {
        value
        for part in configs
        for name, value in vars(part).items()
        if _PLACEHOLDER.search(name) and isinstance(value, int) and not isinstance(value, bool)
    }

    return {value for value in found if value >= 0}
