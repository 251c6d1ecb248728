"""The key/value cache: allocated once, rows without padding, so that a token's place is its
position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awq.generate.plan import Attention


@dataclass
class LayerCache:
    """k, v [batch, kv_heads, positions, head_dim]."""

    k: Tensor
    v: Tensor

    def rows(self, batch: int) -> LayerCache:
        """The first rows, as a view."""
        return LayerCache(self.k[:batch], self.v[:batch])


def allocate(
    layers: list[Attention], batch: int, positions: int, dtype: torch.dtype, device: torch.device
) -> list[LayerCache]:
    """One cache for each attention; 2 · kv_heads · head_dim · batch · positions numbers of `dtype`
    per layer."""
    shapes = [(batch, a.kv_heads, positions, a.head_dim) for a in layers]
    return [
        LayerCache(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))
        for shape in shapes
    ]
