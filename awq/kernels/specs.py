"""What a decoder's norms and attention compute, as the operators of a decode step take them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

WIDEST_HEAD = 256  # channels of a head that the kernels hold


@dataclass
class Norm:
    """y = x̂ · weight + bias in float32, rounded once to x's dtype.

    centered: True for LayerNorm (x̂ = (x − mean)/√(var + eps)), False for RMSNorm (x̂ = x/√(mean x² +
    eps)).
    weight, bias: float32 [features] or None (ones, zeros).
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centered: bool


@dataclass
class Router:
    """How a mixture chooses `top_k` of its experts for a token x.

    score = softmax, or sigmoid, of weight · x + bias, in float32. Chosen are the experts of the
    highest score + correction; of equals, the one with the lower number. Each weighs factor ·
    score, with `normalized` after the chosen scores were divided by their sum.

    groups: the experts lie in so many groups of neighbours, and only those of the best `kept`
    groups may be chosen. A group is as good as the sum of its `group_best` highest score +
    correction, one or two; of equals, the one in front.

    weight: [experts, features], of any float dtype. bias, correction: float32 [experts] or None.
    """

    weight: Tensor
    top_k: int
    sigmoid: bool = False
    normalized: bool = True
    factor: float = 1.0
    bias: Tensor | None = None
    correction: Tensor | None = None
    groups: int = 1
    kept: int = 1
    group_best: int = 1

    @property
    def experts(self) -> int:
        return len(self.weight)


@dataclass(frozen=True)
class Attention:
    """heads: query heads. kv_heads: key and value heads, each shared by heads/kv_heads neighbours.
    scaling: of q·k.

    softcap: c in c·tanh(score/c), or None. window: how many of the last tokens are seen, the
    present one included, or None.
    q_norm, k_norm: over each head (`norm_heads`) or over all heads together, before the rotation.
    rotary: how many of the first channels of a head are rotated (0: no rotation), as two halves.
    value_dim: channels of a value head; None: head_dim. sinks: float32 [heads], the score of a key
    whose value is 0 and which every token sees, or None.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    softcap: float | None
    window: int | None
    rotary: int
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm_heads: bool = True
    value_dim: int | None = None
    sinks: Tensor | None = None

    @property
    def normed(self) -> bool:
        return self.q_norm is not None

    @property
    def centered(self) -> bool:
        """Whether the norms of queries and keys subtract the mean."""
        return self.q_norm is not None and self.q_norm.centered

    @property
    def value_head(self) -> int:
        """Channels of a value head."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def q_scale(self) -> tuple[Tensor | None, float]:
        """(weight, eps) of the norm of queries, (None, 0) without one."""
        return (None, 0.0) if self.q_norm is None else (self.q_norm.weight, self.q_norm.eps)

    @property
    def k_scale(self) -> tuple[Tensor | None, float]:
        """(weight, eps) of the norm of keys, (None, 0) without one."""
        return (None, 0.0) if self.k_norm is None else (self.k_norm.weight, self.k_norm.eps)

    @cached_property
    def channels(self) -> int:
        """Of queries, keys and values of one token together."""
        return sum(self.widths)

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of queries, keys and values."""
        keys = self.kv_heads * self.head_dim
        return self.heads * self.head_dim, keys, self.kv_heads * self.value_head

    def why_no_kernel(self) -> str | None:
        """Why only the reference computes it, or None. Kernels norm each head, by a weight and
        without a bias."""
        if self.head_dim > WIDEST_HEAD:
            return f"heads of {self.head_dim} channels are wider than {WIDEST_HEAD}"
        if self.heads % self.kv_heads:
            return f"{self.kv_heads} key heads do not divide {self.heads} query heads"
        if self.value_head != self.head_dim:
            return f"values have {self.value_head} channels, keys {self.head_dim}"
        if self.sinks is not None:
            return "it has sinks"

        q, k = self.q_norm, self.k_norm
        if q is None and k is None:
            return None
        if q is None or k is None or q.centered != k.centered:
            return "queries and keys have different norms"
        if not self.norm_heads:
            return "its norms go over all heads together"
        if q.weight is None or k.weight is None or q.bias is not None or k.bias is not None:
            return "its norms have a bias, or no weight"
        return None
