"""Texts to token ids, without padding and without the tokenizer's length warnings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from awq.errors import CalibrationError


def tokenize(
    tokenizer: Any, texts: Sequence[str], max_length: int | None = None, special: bool = True, enough: int | None = None
) -> list[list[int]]:
    """Token ids per text; empty results are left out. max_length cuts each text; None keeps it whole.

    enough: stop after the text that brings the sum of tokens to this number; later texts would not be used.
    """
    limits = {"truncation": True, "max_length": max_length} if max_length else {"verbose": False}
    rows: list[list[int]] = []
    total = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=special, **limits)["input_ids"] if text and text.strip() else []
        if len(ids):
            rows.append(list(ids))
            total += len(ids)
        if enough is not None and total >= enough:
            break
    return rows


def prepare_calibration_tokens(tokenizer: Any, texts: Sequence[str], max_length: int = 512) -> list[Tensor]:
    """One int64 tensor [1, n] of token ids per text, n ≤ max_length; texts may differ in length.

    The result goes to `quantize(calibration_tokens, …)` as it is. Raises CalibrationError when no text is left.
    """
    if isinstance(texts, str):
        raise CalibrationError("texts is one string; give a list of strings.")
    rows = tokenize(tokenizer, list(texts), max_length)
    if not rows:
        raise CalibrationError(f"none of the {len(texts)} calibration texts holds a token.")
    return [torch.tensor([row], dtype=torch.long) for row in rows]
