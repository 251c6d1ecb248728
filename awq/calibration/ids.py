"""Token ids as people hold them (lists, arrays, tensors, a tokenizer's padded output), as rows
without padding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from awq.calibration.tokens import Row, as_row
from awq.errors import CalibrationError


def is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def unpadded(item: Mapping, pad_id: int | None) -> list[Row]:
    """Rows of a tokenizer's output without its padding.

    pad_id: what pads ids that come without an attention mask; None: nothing does.
    """
    if "input_ids" not in item:
        raise CalibrationError(f"a calibration sample has keys {shown(item)} but no input_ids.")

    types = item.get("token_type_ids")
    if _is_ragged(item["input_ids"]):  # lengths differ: the tokenizer did not pad
        found = zip(
            item["input_ids"], types if types is not None else [None] * len(item["input_ids"])
        )
        return [as_row(integers(ids).tolist(), kinds) for ids, kinds in found if len(ids)]

    ids = integers(item["input_ids"])
    ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
    mask = _mask(item, ids, pad_id)
    kinds = torch.zeros_like(ids) if types is None else _fitting("token_type_ids", types, ids)
    rows = zip(ids, kinds, mask)

    return [
        as_row(row[keep].tolist(), kind[keep].tolist())
        for row, kind, keep in rows
        if bool(keep.any())
    ]


def _mask(item: Mapping, ids: Tensor, pad_id: int | None) -> Tensor:
    """bool [rows, tokens]: real tokens, by the attention mask or by the padding id at the ends
    of rows."""
    if item.get("attention_mask") is not None:
        return _fitting("attention_mask", item["attention_mask"], ids).bool()
    if pad_id is None:
        return torch.ones_like(ids, dtype=torch.bool)

    real = (ids != pad_id).long()
    from_start = real.cumsum(1).clamp(max=1)
    from_end = real.flip(1).cumsum(1).flip(1).clamp(max=1)

    return (from_start * from_end).bool()  # a padding id inside a text stays


def _is_ragged(ids: Any) -> bool:
    if not isinstance(ids, (list, tuple)) or not ids:
        return False
    return all(hasattr(row, "__len__") for row in ids) and len({len(row) for row in ids}) > 1


def id_rows(item: Any) -> list[list[int]]:
    """Rows of one sample: a list of ids, a tensor or array [n] or [rows, n]."""
    ids = integers(item)
    return ids.tolist() if ids.dim() == 2 else [ids.tolist()]


def integers(values: Any) -> Tensor:
    """int64 ids [n] or [rows, n]. Raises CalibrationError for anything else."""
    try:
        ids = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CalibrationError(
            f"a calibration sample is {type(values).__name__}, not token ids or text."
        ) from error

    if ids.is_meta:
        raise CalibrationError("calibration ids are on the meta device, where they have no values.")

    if ids.layout != torch.strided or isinstance(values, np.ma.MaskedArray):
        raise CalibrationError(
            f"calibration ids are a {type(values).__name__} with values left out; give an "
            "ordinary tensor or array, and an attention mask."
        )

    empty = ids.numel() == 0
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.dim() not in (1, 2) or not (whole or empty):
        raise CalibrationError(
            f"calibration ids have shape {tuple(ids.shape)} and dtype {ids.dtype}; give integers "
            "[n] or [rows, n]."
        )
    return ids.detach().cpu().long()


def _fitting(name: str, values: Any, ids: Tensor) -> Tensor:
    """int64 [rows, tokens] of the same shape as the ids."""
    try:
        found = torch.as_tensor(values if isinstance(values, Tensor) else np.asarray(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(
            f"{name} is {type(values).__name__}; give numbers like the ids."
        ) from error

    if found.numel() != ids.numel():
        raise CalibrationError(
            f"{name} has shape {tuple(found.shape)}, the ids {tuple(ids.shape)}; they must be "
            "equal."
        )
    if found.is_complex() or (found.is_floating_point() and not bool(found.isfinite().all())):
        raise CalibrationError(f"{name} holds values that are not finite numbers.")
    return found.detach().cpu().view_as(ids).long()


def shown(keys: Iterable[Any], most: int = 8) -> str:
    """A list of keys for a message, cut where there are many."""
    found = [repr(str(key))[:40] for key in keys]
    shown = ", ".join(found[:most])
    if len(found) > most:
        return f"[{shown}, … {len(found) - most} more]"
    return f"[{shown}]"
