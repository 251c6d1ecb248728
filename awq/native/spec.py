"""What is the same for every text of an encoder: constants of its machine code."""

from __future__ import annotations

from typing import NamedTuple

PHASES_PER_LAYER = 9
LINE_BYTES = 64  # of a cache line
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

    def row_bytes(self, width: int) -> int:
        """From one token's integers of `width` values to the next one's.

        Slices of tokens are at different products at the same time, so the vectors' rows are as far
        apart for every width. An odd number of cache lines keeps rows that are read together from
        falling into the same few places of the nearest cache.
        """
        if self.matrix_unit:
            return width * self.planes
        lines = -(-self.widest * self.planes // LINE_BYTES)
        return (lines | 1) * LINE_BYTES

    def row_groups(self, width: int) -> int:
        """The same of the groups' steps and sums."""
        return (width if self.matrix_unit else self.widest) // self.group

    @property
    def widest(self) -> int:
        """Inputs of the widest product."""
        return max(self.hidden, self.inner, self.context)

    @property
    def phases(self) -> int:
        return 2 + PHASES_PER_LAYER * self.layers
