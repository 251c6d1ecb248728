"""Masked batches of token ids: streams packed into full rows for decoders, one text per row for encoders."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from awq.calibration.sources import bundled_texts, named_texts
from awq.calibration.tokens import Row, as_row, tokenize
from awq.errors import CalibrationError

logger = logging.getLogger("awq.calibration")

BATCH_TOKENS = 4096


class CalibrationBatch(NamedTuple):
    """input_ids, attention_mask: int64 [batch, tokens], mask 1 on real tokens. extra: other inputs, as token_type_ids."""

    input_ids: Tensor
    attention_mask: Tensor
    extra: dict[str, Tensor] = {}

    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments for the model's forward."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **self.extra}


def load_calibration(
    data: Any = None,
    tokenizer: Any = None,
    *,
    split: str = "train",
    text_column: str = "text",
    max_samples: int = 128,
    max_length: int = 512,
    mode: str = "pack",
    pad_id: int | None = None,
) -> list[CalibrationBatch]:
    """Batches of about 4,096 tokens from any kind of calibration data.

    data: None (the bundled text), a dataset name or local file, texts, pairs of texts (one row each, as a cross-encoder reads
    them), lists of token ids, a [samples, tokens] tensor, id tensors of different lengths, or tokenizer outputs, whose masks
    and token types are kept. Long samples are cut, not dropped.
    mode: "pack" joins the samples into one stream and cuts it into rows of max_length (decoders; at most max_samples rows);
    "rows" keeps one sample per row, padded and masked (encoders; at most max_samples rows): a long text keeps its first
    max_length tokens with the special ones, long token ids become several rows.
    Raises CalibrationError when the data is empty or not understood.
    """
    if mode not in ("pack", "rows"):
        raise CalibrationError(f"mode is {mode!r}; use 'pack' or 'rows'.")
    if max_samples < 1 or max_length < 1:
        raise CalibrationError(f"max_samples {max_samples} and max_length {max_length} must be at least 1.")
    rows = _token_rows(data, tokenizer, split, text_column, max_samples, max_length, mode, pad_id)
    if not rows:
        raise CalibrationError("the calibration data is empty; give at least one text with at least one token.")
    if min(min(row["input_ids"]) for row in rows) < 0:
        raise CalibrationError("calibration ids are negative; use an attention mask to leave tokens out.")
    if mode == "pack" and not _are_rows(data):
        stream = [i for row in rows for i in row["input_ids"]]
        cut = [stream[i : i + max_length] for i in range(0, len(stream), max_length)]
        # A short remainder would need padding; it is kept only when there is nothing else.
        rows = [{"input_ids": ids} for ids in [r for r in cut if len(r) == max_length] or cut]
    else:
        rows = [
            {key: values[i : i + max_length] for key, values in row.items()}
            for row in rows for i in range(0, len(row["input_ids"]), max_length)
        ]  # fmt: skip
    rows = rows[:max_samples]
    pad = pad_id if pad_id is not None else getattr(tokenizer, "pad_token_id", None) or 0
    return _batches(rows, pad)


def _are_rows(data: Any) -> bool:
    """Token rows given by the caller stay rows: their boundaries mean something."""
    return isinstance(data, (Tensor, np.ndarray)) and data.ndim == 2


def _token_rows(
    data: Any, tokenizer: Any, split: str, column: str, max_samples: int, max_length: int, mode: str, pad_id: int | None
) -> list[Row]:
    if data is None:
        logger.warning("no calibration data given: using the bundled text. Texts of your own task give better results.")
        data = bundled_texts()
    if isinstance(data, str):
        data = named_texts(data, split, column, limit=max_samples * 8)
    if isinstance(data, np.ndarray):
        data = torch.from_numpy(data)
    if isinstance(data, Mapping) or (isinstance(data, Tensor) and data.dim() == 2):
        return _unpadded(data, tokenizer, pad_id)
    if not isinstance(data, Sequence) and not isinstance(data, Tensor):
        raise CalibrationError(f"calibration data is {type(data).__name__}; give texts, token ids, a file or a dataset name.")
    rows: list[Row] = []
    texts = [item for item in data if is_text(item)]
    if texts:
        if len(texts) != len(data):
            raise CalibrationError("calibration data mixes strings with other kinds; give one kind.")
        if tokenizer is None:
            raise CalibrationError("calibration texts need a tokenizer: quantize(tokenizer, calib_data=texts).")
        if mode == "rows":
            return tokenize(tokenizer, texts[: max_samples * 64], max_length)
        return tokenize(tokenizer, texts, special=False, enough=max_samples * max_length)
    for item in [data] if isinstance(data, Tensor) else data:
        if isinstance(item, Mapping):
            rows += _unpadded(item, tokenizer, pad_id)
        else:
            rows += [as_row(ids) for ids in _id_rows(item)]
    return [row for row in rows if row["input_ids"]]


def is_text(item: Any) -> bool:
    """Whether a calibration sample is a text or a pair of texts."""
    pair = isinstance(item, (tuple, list)) and len(item) == 2
    return isinstance(item, str) or (pair and all(isinstance(part, str) for part in item))


def _id_rows(item: Any) -> list[list[int]]:
    """Rows of one element: a 1-D or 2-D tensor, or a list of ids."""
    ids = item if isinstance(item, Tensor) else None
    if ids is None:
        try:
            ids = torch.as_tensor(item)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CalibrationError(f"a calibration sample is {type(item).__name__}, not token ids or text.") from error
    if ids.numel() == 0:
        return []  # an empty list has no dtype of its own
    if ids.is_floating_point() or ids.dim() not in (1, 2):
        raise CalibrationError(f"calibration ids have shape {tuple(ids.shape)} and dtype {ids.dtype}; give integers [n] or [1, n].")
    return (ids if ids.dim() == 2 else ids.unsqueeze(0)).tolist()


def _unpadded(item: Mapping | Tensor, tokenizer: Any, pad_id: int | None) -> list[Row]:
    """Rows of a tokenizer's output or a [samples, tokens] tensor without their padding."""
    given = item.get("token_type_ids") if isinstance(item, Mapping) else None
    if isinstance(item, Mapping) and "input_ids" not in item:
        raise CalibrationError(f"a calibration sample has keys {sorted(item)} but no input_ids.")
    if isinstance(item, Mapping) and _is_ragged(item["input_ids"]):
        found = zip(item["input_ids"], given if given is not None else [None] * len(item["input_ids"]))
        return [as_row(row, kinds) for row, kinds in found if len(row)]  # lengths differ: the tokenizer did not pad
    ids = torch.as_tensor(item["input_ids"] if isinstance(item, Mapping) else item)
    if ids.is_floating_point():
        raise CalibrationError(f"calibration ids have dtype {ids.dtype}; give integers.")
    mask = torch.as_tensor(item["attention_mask"]) if isinstance(item, Mapping) and "attention_mask" in item else None
    ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
    if mask is None:
        pad = pad_id if pad_id is not None else getattr(tokenizer, "pad_token_id", None)
        mask = torch.ones_like(ids) if pad is None else _trailing_mask(ids, pad)
    types = torch.as_tensor(given).view_as(ids) if given is not None else torch.zeros_like(ids)
    parts = zip(ids, types, mask.view_as(ids).bool())
    return [as_row(row[keep].tolist(), kinds[keep].tolist()) for row, kinds, keep in parts if bool(keep.any())]


def _is_ragged(ids: Any) -> bool:
    return isinstance(ids, list) and bool(ids) and isinstance(ids[0], list) and len({len(row) for row in ids}) > 1


def _trailing_mask(ids: Tensor, pad: int) -> Tensor:
    """1 between the first and the last id that is no padding: a pad id inside a text stays."""
    real = (ids != pad).long()
    return (real.cumsum(1).clamp(max=1) * real.flip(1).cumsum(1).flip(1).clamp(max=1)).long()


def _batches(rows: list[Row], pad: int, tokens: int = BATCH_TOKENS) -> list[CalibrationBatch]:
    """Rows sorted by length (stable) in batches of about `tokens` padded tokens."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
    batches, start = [], 0
    while start < len(ordered):
        longest = len(ordered[start]["input_ids"])
        part = ordered[start : start + max(1, tokens // longest)]
        start += len(part)
        keys = dict.fromkeys(key for row in part for key in row if key not in ("input_ids", "attention_mask"))
        ones = [row.get("attention_mask", [1] * len(row["input_ids"])) for row in part]
        extra = {key: _padded([row.get(key, []) for row in part], longest, 0) for key in keys}
        batches.append(CalibrationBatch(_padded([r["input_ids"] for r in part], longest, pad), _padded(ones, longest, 0), extra))
    return batches


def _padded(rows: list[list[int]], length: int, fill: int) -> Tensor:
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows], dtype=torch.long)


def general_rows(batches: Sequence[CalibrationBatch], tokenizer: Any) -> list[CalibrationBatch]:
    """Batches of the bundled text with as many rows as `batches`, of their longest row's length."""
    rows = sum(len(b.input_ids) for b in batches)
    longest = max(b.input_ids.shape[1] for b in batches)
    return load_calibration(bundled_texts(), tokenizer, max_samples=rows, max_length=longest)


def rebatched(batches: Sequence[CalibrationBatch], tokens: int = BATCH_TOKENS) -> list[CalibrationBatch]:
    """The same rows in batches of about `tokens`, which depend on the rows alone, not on how they were padded or put together.

    Padding at the ends of rows goes, rows are sorted by length (stable) and padded again, on the right. Sums in floating point
    depend on shapes, so this is what makes quantized weights equal bit for bit with and without padding. Batches stay as they
    are when `extra` holds something that is not [batch, tokens].
    """
    if any(value.shape != b.input_ids.shape or value.is_floating_point() for b in batches for value in b.extra.values()):
        return list(batches)
    rows: list[Row] = []
    for batch in batches:
        for i, mask in enumerate(batch.attention_mask.bool()):
            places = mask.nonzero().flatten().tolist()
            if places:
                part = slice(places[0], places[-1] + 1)
                rows.append({key: value[i, part].tolist() for key, value in batch.model_inputs().items()})
    return _batches(rows, 0, tokens)
