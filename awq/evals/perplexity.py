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

    model: any callable of input_ids [1, n] whose result has `.logits`. input_ids: int64 [tokens]. Windows of `window` tokens do not
    overlap; the first token of each is not predicted. limit: use only so many tokens. Log likelihoods are float32.
    """
    ids = input_ids.reshape(-1)[:limit]
    if len(ids) < 2:
        raise ValueError(f"perplexity needs at least 2 tokens, got {len(ids)}.")
    if window < 2:
        raise ValueError(f"window is {window}; a window of at least 2 tokens predicts something.")
    device = device_of(model)
    total, count = 0.0, 0
    for part in ids.split(window):
        if len(part) < 2:
            continue
        part = part.to(device)
        logits = model(input_ids=part.unsqueeze(0)).logits[0, :-1]
        total += float(F.cross_entropy(logits.float(), part[1:], reduction="sum"))
        count += len(part) - 1
    mean = total / count
    return math.exp(mean) if mean < 700 else mean * math.inf  # float64 ends at exp(709); NaN stays NaN


def device_of(model: Any) -> torch.device:
    """Where the model's inputs belong: the device of its first parameter; CPU for callables without parameters."""
    parameters = getattr(model, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return first.device if first is not None else torch.device("cpu")
