"""The attention of a decoder as kernels take it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heads:
    """heads, kv_heads, dim; rotary: half the rotated channels; window 0: none; normed, mean: norm of each query and key head."""

    heads: int
    kv_heads: int
    dim: int
    rotary: int
    scaling: float
    softcap: float | None
    window: int
    normed: bool
    mean: bool
    q_eps: float = 0.0
    k_eps: float = 0.0
