"""Perplexity over non-overlapping windows."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def perplexity(model: Any, input_ids: Tensor, window: int = 2048, limit: int | None = None) -> float:
    """exp of the mean negative log likelihood (nats) of every predicted token.

    model: called with input_ids [1, n], returns `.logits`. input_ids: int64 [tokens]. Windows of `window` tokens do not
    overlap; the first token of each is not predicted. limit: use only so many tokens. Log likelihoods are float32.
    """
    ids = input_ids.reshape(-1)[:limit]
    if len(ids) < 2:
        raise ValueError(f"perplexity needs at least 2 tokens, got {len(ids)}.")
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for part in ids.split(window):
        if len(part) < 2:
            continue
        part = part.to(device)
        logits = model(input_ids=part.unsqueeze(0)).logits[0, :-1]
        total += float(F.cross_entropy(logits.float(), part[1:], reduction="sum"))
        count += len(part) - 1
    return math.exp(total / count)
