"""What is the same for every text of an encoder: constants of its machine code."""

from __future__ import annotations

from typing import NamedTuple

PHASES_PER_LAYER = 9
COUNTERS_PER_PHASE = 8  # int64, one cache line: items taken, taken from the back, done


class EncoderSpec(NamedTuple):
    """What is the same for every text. Widths in features; `planes`: int8 digits of an activation,
    1 to 3.

    pre_norm: norms come before attention and MLP instead of after the residual sum. post_norms:
    what attention and MLP give is normed before it is added. words_factor: what rows of the
    embedding table are multiplied by. pooling: mean, cls or lasttoken. matrix_unit: AMX
    computes the products.
    """

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    layers: int
    group: int
    planes: int
    eps: float
    scaling: float
    activation: str
    gated: bool
    centered: bool
    pre_norm: bool
    post_norms: bool
    words_factor: float
    embedding_norm: bool
    rotary: int
    relative: bool
    causal: bool
    windowed: bool
    qk_norm: bool
    qk_eps: float
    pooling: str
    normalize: bool
    matrix_unit: bool

    @property
    def channels(self) -> int:
        """Outputs of the joined product of q, k and v."""
        return (self.heads + 2 * self.kv_heads) * self.dim

    @property
    def context(self) -> int:
        return self.heads * self.dim

    @property
    def phases(self) -> int:
        return 2 + PHASES_PER_LAYER * self.layers
