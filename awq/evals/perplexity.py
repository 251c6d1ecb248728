"""Perplexity over non-overlapping windows."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.nn.model_code import model_code

LARGEST_EXPONENT = 700  # float64 ends at exp(709)


@torch.no_grad()
def token_losses(
    model: Any,
    input_ids: Tensor,
    window: int = 2048,
    limit: int | None = None,
) -> Tensor:
    """Negative log likelihood of every predicted token in nats, float32 [predicted] on the CPU.

    Arguments and errors are those of `perplexity`.
    """
    ids = input_ids.reshape(-1)[:limit]
    if len(ids) < 2:
        raise ValueError(f"perplexity needs at least 2 tokens, got {len(ids)}.")
    if window < 2:
        raise ValueError(f"window is {window}; a window of at least 2 tokens predicts something.")

    device = device_of(model)
    losses = []
    for part in ids.split(window):
        if len(part) < 2:
            continue
        part = part.to(device)
        with model_code(type(model).__name__):
            logits = model(input_ids=part.unsqueeze(0)).logits[0, :-1]
        losses.append(F.cross_entropy(logits.float(), part[1:], reduction="none").cpu())

    return torch.cat(losses)


def perplexity(
    model: Any,
    input_ids: Tensor,
    window: int = 2048,
    limit: int | None = None,
) -> float:
    """exp of the mean negative log likelihood (nats) of every predicted token.

    model: any callable of input_ids [1, n] whose result has `.logits`. input_ids: int64 [tokens].
    Windows of `window` tokens do not overlap; the first token of each is not predicted. limit: use
    only so many tokens. Log likelihoods are float32.

    >>> round(perplexity(uniform_model, torch.arange(32), window=16))  # all 64 tokens alike likely
    64
    """
    return exp_of(float(token_losses(model, input_ids, window, limit).double().mean()))


def exp_of(loss: float) -> float:
    """The perplexity of a mean loss: infinite where float64 ends, NaN where the loss is."""
    return math.exp(loss) if loss < LARGEST_EXPONENT else loss * math.inf


def device_of(model: Any) -> torch.device:
    """Where the model's inputs belong: the device of its first parameter; CPU for callables without
    parameters."""
    parameters = getattr(model, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return first.device if first is not None else torch.device("cpu")
