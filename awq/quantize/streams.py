"""Calibration inputs that walk through the blocks of a model, and the short ones that folds are found and proven on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from awq.calibration import CalibrationBatch
from awq.nn.blocks import BlockCall, record_block_calls

PROBE_TOKENS = 32  # tokens per row of the fold proof
PROBE_ROWS = 2
ONE_TOKEN_ROWS = 64  # one-token sequences that map producer rows to channels


@dataclass
class Stream:
    """Inputs that walk through the blocks of one list: per batch, the hidden states and the token mask.

    original: the hidden states of the original model beside those of the quantized one, where they are needed; unseen: batches
    that the comparison of both leaves out.
    """

    calls: list[list[BlockCall]]  # [batch][block]
    hidden: list[Tensor]
    masks: list[Tensor | None]
    original: list[Tensor] | None = None
    unseen: frozenset[int] = frozenset()

    def at(self, index: int, device: torch.device) -> list[tuple[BlockCall, Tensor]]:
        return [(calls[index].to(device, torch.float32), h.to(device).float()) for calls, h in zip(self.calls, self.hidden)]

    def advance(self, block: nn.Module, index: int, device: torch.device) -> None:
        """Past one block."""
        self.hidden = [call.run(block, hidden) for call, hidden in self.at(index, device)]


def open_streams(model: nn.Module, lists, batches: Sequence[CalibrationBatch]) -> list[tuple[Stream, Stream, Stream]]:
    """(calibration, many-token probe, one-token probe) for every block list."""
    device = next(model.parameters()).device
    longest = max(batches, key=lambda b: int(b.attention_mask.sum(1).max()))
    rows = longest.attention_mask.sum(1).argsort(descending=True, stable=True)[:PROBE_ROWS]
    ids, mask = longest.input_ids[rows], longest.attention_mask[rows].bool()
    length = max(1, min(PROBE_TOKENS, int(mask.sum(1).min())))
    probe = torch.stack([row[keep][:length] for row, keep in zip(ids, mask)])
    tokens = torch.cat([b.input_ids[b.attention_mask.bool()] for b in batches[:8]]).unique()
    single = tokens[torch.linspace(0, len(tokens) - 1, min(ONE_TOKEN_ROWS, len(tokens))).long()].unsqueeze(1)
    sets = [
        list(batches),
        [CalibrationBatch(probe, torch.ones_like(probe))],
        [CalibrationBatch(single, torch.ones_like(single))],
    ]
    recorded = []
    for group in sets:
        inputs = [{k: v.to(device) for k, v in b.model_inputs().items()} for b in group]
        recorded.append(record_block_calls(model, lists, inputs))
    masks = [None if bool(b.attention_mask.all()) else b.attention_mask.bool() for b in batches]
    return [
        (Stream(recorded[0].calls[i], recorded[0].hidden[i], masks),
         Stream(recorded[1].calls[i], recorded[1].hidden[i], [None]),
         Stream(recorded[2].calls[i], recorded[2].hidden[i], [None]))
        for i in range(len(lists))
    ]  # fmt: skip
