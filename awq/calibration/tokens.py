"""Texts to token ids, without padding and without the tokenizer's length warnings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from awq.errors import CalibrationError

Row = dict[str, list[int]]
"""One sample: "input_ids", and "token_type_ids" where they are not all 0 (the second of a pair)."""


def tokenize(
    tokenizer: Any,
    texts: Sequence[str | Sequence[str]],
    max_length: int | None = None,
    special: bool = True,
    enough: int | None = None,
) -> list[Row]:
    """One row per text or pair of texts; empty ones are left out. max_length cuts each; None keeps
    it whole.

    enough: stop after the text that brings the sum of tokens to this number; later texts would not
    be used.
    """
    limits = {"truncation": True, "max_length": max_length} if max_length else {"verbose": False}
    rows: list[Row] = []
    total = 0
    for text in texts:
        parts = (text,) if isinstance(text, str) else tuple(text)
        if any(part.strip() for part in parts):
            found = tokenizer(*parts, add_special_tokens=special, **limits)
        else:
            found = {}

        if found and len(found["input_ids"]):
            rows.append(as_row(found["input_ids"], found.get("token_type_ids")))
            total += len(rows[-1]["input_ids"])

        if enough is not None and total >= enough:
            break

    return rows


def as_row(ids: Sequence[int], types: Sequence[int] | None = None) -> Row:
    """Types that are all 0 are left out: models take 0 by themselves, and some tokenizers give
    types that no model takes."""
    return {"input_ids": list(ids)} | (
        {"token_type_ids": list(types)} if types is not None and any(types) else {}
    )


def prepare_calibration_tokens(
    tokenizer: Any,
    texts: Sequence[str],
    max_length: int = 512,
) -> list[Tensor]:
    """One int64 tensor [1, n] of token ids per text, n ≤ max_length; texts may differ in length.

    The result goes to `quantize(calibration_tokens, …)` as it is. Raises CalibrationError when no
    text is left.
    """
    if isinstance(texts, str):
        raise CalibrationError("texts is one string; give a list of strings.")

    rows = tokenize(tokenizer, list(texts), max_length)
    if not rows:
        raise CalibrationError(f"none of the {len(texts)} calibration texts holds a token.")
    return [torch.tensor([row["input_ids"]], dtype=torch.long) for row in rows]
