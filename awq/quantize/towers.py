"""Which lists of blocks are quantized: those that text runs through, and towers that are asked for.

Calibration with images or sound runs through vision and audio towers, too. They hold few weights,
and rounding them costs more than it saves, so they stay dense unless their names are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from awq.errors import CalibrationError, ConfigError, ModelError
from awq.nn.blocks import BlockList
from awq.nn.decoder_inputs import placeholder_ids
from awq.nn.reached import reached_lists

_TOKENS = ("input_ids", "attention_mask", "token_type_ids")


def chosen_lists(
    model: nn.Module,
    lists: Sequence[BlockList],
    item: dict[str, Tensor],
    towers: Sequence[str],
) -> tuple[list[BlockList], dict[str, Any]]:
    """(the lists to quantize, in the order in which they run; towers that run but were not asked
    for, by name).

    item: calibration inputs of the model. towers: parts of names. Raises ConfigError for a name
    that is no list of blocks, CalibrationError for a tower that `item` does not reach.
    """
    reached = reached_lists(model, lists, item)
    asked = {prefix for prefix, _ in lists if any(f".{t}." in f".{prefix}." for t in towers)}
    for tower in towers:
        if not any(f".{tower}." in f".{prefix}." for prefix, _ in lists):
            names = ", ".join(prefix for prefix, _ in lists)
            raise ConfigError(
                f"towers: {tower!r} is no list of blocks of the model; it has {names}."
            )

    missing = asked - {prefix for prefix, _ in reached}
    if missing:
        raise CalibrationError(
            f"towers: calibration data does not reach {min(missing)}; give samples with images or "
            "sound."
        )
    if set(item) <= set(_TOKENS):
        return reached, {}

    by_text = _reached_by_text(model, lists, item)
    others = {prefix: blocks for prefix, blocks in reached if prefix not in by_text | asked}

    return [entry for entry in reached if entry[0] not in others], others


def _reached_by_text(
    model: nn.Module,
    lists: Sequence[BlockList],
    item: dict[str, Tensor],
) -> set[str]:
    """Names of the lists that run on text alone; all, where the model cannot do without the rest
    (a decoder of sound)."""
    if "input_ids" not in item:
        return {prefix for prefix, _ in lists}

    ids = item["input_ids"][:1]
    known = torch.tensor(sorted(placeholder_ids(model)), dtype=ids.dtype, device=ids.device)
    text = ids[:, ~torch.isin(ids[0], known)]
    tokens = {name: item[name] for name in item if name.endswith(_TOKENS)}
    only = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    if "decoder_input_ids" in tokens:
        only |= {name: tokens[name][:1] for name in tokens if name.startswith("decoder_")}
    try:
        return {prefix for prefix, _ in reached_lists(model, lists, only)}
    except ModelError:
        return {prefix for prefix, _ in lists}
