"""What a request to `generate` holds, checked once, before any kernel sees the address of a tensor.

On a CPU a kernel that is handed ids beyond the embedding or a mask of another shape reads and
writes memory of others; on a GPU an assertion inside a kernel costs the whole process. So the door
refuses such requests with one line.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from awq.errors import ConfigError

_ID_TYPES = (torch.int64, torch.int32)


def check_request(vocabulary: int, kwargs: dict[str, Any], padding: Any = None) -> None:
    """Raises ConfigError when ids, mask or the number of new tokens cannot be what is meant.

    vocabulary: rows of the model's embedding. kwargs: of `generate`; ids are int64 or int32 [batch,
    tokens], the mask is 0 or 1 in the same shape with at least one token that counts in every row.
    What is not given is not checked. padding: the id that rows get which end before others.
    """
    for name in ("max_new_tokens", "max_length", "min_new_tokens", "min_length"):
        _check_count(name, kwargs.get(name))
    ids = kwargs.get("input_ids", kwargs.get("inputs"))
    if ids is None:
        return

    _check_ids(ids, vocabulary)
    mask = kwargs.get("attention_mask")
    if mask is not None:
        _check_mask(mask, ids)
    if len(ids) > 1:
        _check_padding(padding, vocabulary)


def _check_count(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise ConfigError(f"{name} is {value!r}; give a number of tokens, as in {name}=64.")


def _check_ids(ids: Any, vocabulary: int) -> None:
    if not isinstance(ids, Tensor):
        kind = type(ids).__name__
        raise ConfigError(
            f"input_ids are a {kind}; give a tensor [batch, tokens], as tokenizer(text, "
            "return_tensors='pt') does."
        )
    if ids.is_meta or ids.layout != torch.strided:
        kind = "on the meta device" if ids.is_meta else str(ids.layout).removeprefix("torch.")
        raise ConfigError(f"input_ids are {kind}; give an ordinary tensor that holds numbers.")
    if ids.dim() != 2 or ids.dtype not in _ID_TYPES:
        raise ConfigError(
            f"input_ids are {ids.dtype} of shape {tuple(ids.shape)}; give int64 ids [batch, "
            "tokens]."
        )
    if ids.numel() == 0:
        raise ConfigError(
            f"input_ids of shape {tuple(ids.shape)} hold no token; give at least one for each row."
        )

    low, high = torch.stack(ids.aminmax()).tolist()
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        known = f"the model knows the ids 0 to {vocabulary - 1}"
        raise ConfigError(
            f"input_ids hold {wrong}; {known}. Are they of another model's tokenizer?"
        )


def _check_mask(mask: Any, ids: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ConfigError(
            f"attention_mask is {found} for input_ids {tuple(ids.shape)}; give a tensor of the "
            "same shape."
        )
    if mask.is_meta or mask.layout != torch.strided:
        raise ConfigError("attention_mask holds no numbers; give an ordinary tensor of 0 and 1.")

    counts = mask == 1
    known, filled = torch.stack(
        [(counts | (mask == 0)).all(), counts.any(dim=1).all()]
    ).tolist()  # together, since a GPU is waited for once
    if not known:
        raise ConfigError("attention_mask holds other numbers than 0 and 1.")
    if not filled:
        raise ConfigError("a prompt of the batch is empty: its attention_mask is 0 everywhere.")


def _check_padding(padding: Any, vocabulary: int) -> None:
    """Of several rows some end first. Their padding is looked up like any other token, by the
    processors of scores at the latest."""
    if isinstance(padding, Integral) and not 0 <= int(padding) < vocabulary:
        raise ConfigError(
            f"pad_token_id is {padding}; the model knows the ids 0 to {vocabulary - 1}. Give "
            "pad_token_id=, or one row at a time."
        )
