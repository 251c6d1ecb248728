"""Which places of the cache a forward of the fused blocks writes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from awq.generate.plan import Table


@dataclass
class _LookUps:
    """What tables said at the positions of this forward, for all blocks."""

    found: dict[int, Tensor] = field(default_factory=dict, kw_only=True)

    def looked_up(self, table: Table, positions: Tensor) -> Tensor:
        """The table's rows at positions [batch, tokens]."""
        if id(table) not in self.found:
            self.found[id(table)] = table.at(positions)
        return self.found[id(table)]


@dataclass
class Prompt(_LookUps):
    """A piece of the prompts: its tokens are positions start, start + 1, … of every row."""

    start: int

    def positions(self, x: Tensor) -> Tensor:
        """int64 [batch, tokens] of the tokens of x [batch, tokens, features]."""
        batch, tokens, _ = x.shape
        places = torch.arange(self.start, self.start + tokens, device=x.device)
        return places.expand(batch, -1)


@dataclass
class Step(_LookUps):
    """One new token per row. lengths: int32 [batch] on the device, tokens cached so far, which is
    the new one's position.

    longest: the largest of them, where the host knows it.
    """

    lengths: Tensor
    longest: int

    def positions(self, x: Tensor) -> Tensor:
        """int64 [batch, 1] of the tokens of x [batch, 1, features]."""
        return self.lengths.long().unsqueeze(1)
