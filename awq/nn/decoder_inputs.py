"""What an encoder-decoder needs beside a text: something for its decoder to read.

Calibration data holds texts, and most users have no pairs of a source and its target. The decoder
then reads the text itself, shifted by its start token, as it would when it is trained to repeat its
input. That is natural text behind a natural cross-attention; pairs of the user's own task are
better, and stay as they are.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def with_decoder_inputs(model: nn.Module, item: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's inputs with `decoder_input_ids` and `decoder_attention_mask`, where it takes them
    and they are lacking.

    item: `input_ids` and `attention_mask` [rows, tokens], and others. The decoder's rows are one
    token shorter, so that the mask of either side can be told by its shape; rows of a single token
    stay what they are, as probes want them.
    """
    if not takes_decoder_inputs(model) or "decoder_input_ids" in item:
        return item
    ids, mask = item["input_ids"], item["attention_mask"]
    if ids.shape[1] > 1:
        start = torch.full_like(ids[:, :1], _start_token(model))
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


def _start_token(model: nn.Module) -> int:
    for config in (getattr(model, "generation_config", None), model.config):
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            value: Any = getattr(config, name, None)
            if isinstance(value, int) and value >= 0:
                return value
    return 0
