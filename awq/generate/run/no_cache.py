"""Models without a cache (GPT): every step reads all tokens again, as in transformers' loop, and is
captured in a CUDA graph for that."""

from __future__ import annotations

import torch
from torch import Tensor

from awq.generate.run.static import StaticDecoder

_FEWEST = 64  # columns of a graph; the next one has twice as many


class WholeDecoder(StaticDecoder):
    """As `StaticDecoder`, with the ids of the sequences in place of a cache. Columns behind the
    last token hold a token that attention, which looks back, does not see."""

    caching: dict[str, bool] = {}

    def make_cache(self) -> None:
        self.ids = torch.zeros_like(self.mask)

    def begin_anew(self) -> None:
        pass

    def read_prompt(self, ids: Tensor, positions: Tensor) -> Tensor:
        self.ids.copy_(ids[:, -1:])  # never the padding token, which models look for
        self.ids[:, : ids.shape[1]] = ids
        return super().read_prompt(ids, positions)

    def columns_for(self, longest: int) -> int:
        columns = _FEWEST
        while columns < longest + self.before + 1:
            columns *= 2
        return min(columns, self.max_seq_len)

    def step_over(self, columns: int, ids: Tensor, lengths: Tensor) -> Tensor:
        place = (lengths + self.padding).max().long().view(1)
        self.ids.index_copy_(1, place, ids.unsqueeze(1))

        all_places = torch.arange(columns, device=self.device)
        positions = (all_places - self.padding.unsqueeze(1)).clamp(min=0)
        kept = dict.fromkeys(self.last_only, place)
        out = self.call(
            self.ids[:, :columns],
            positions,
            self.mask[:, :columns],
            None,
            **kept,
        )

        if kept:
            return self.last_of(out)
        of_place = out.logits.index_select(1, place)
        return of_place.squeeze(1).float()
