"""What a decoder is made of, as plain data: found on the model in `read`, proven by `prove`,
carried out in `run`.

Plans are frozen: they are made when everything is known, and nobody changes them afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from awq.errors import AwqError
from awq.kernels.specs import Attention as Attention
from awq.kernels.specs import Norm as Norm
from awq.kernels.specs import Router as Router
from awq.nn.block_calls import BlockCall


class NotFusable(AwqError):
    """Why a model keeps transformers' own loop."""


@dataclass(frozen=True)
class Source:
    """Sibling linears, by name in the block, whose concatenated outputs hold the wanted channels at
    `rows` [wanted]."""

    names: tuple[str, ...]
    rows: Tensor


@dataclass(frozen=True)
class Table:
    """An argument of a module that depends on the position of a token alone: values [positions,
    …]. copies: how many times it is given one above the other (for time, row and column of an
    image, which are the same in text); 0: once, without an axis for that."""

    values: Tensor
    copies: int = 0

    def at(self, positions: Tensor) -> Tensor:
        """[batch, tokens, …] for positions int64 [batch, tokens], or [copies, batch, tokens, …]."""
        found = self.values[positions]
        return found.expand(self.copies, *found.shape) if self.copies else found


def map_templates(value: Any, change: Callable[[Table], Any]) -> Any:
    """Applies `change` to every table in nested tuples, lists, dicts and calls."""
    if isinstance(value, Table):
        return change(value)
    if isinstance(value, BlockCall):
        args, kwargs = map_templates((value.args, value.kwargs), change)
        return BlockCall(args, kwargs, value.where)
    if isinstance(value, (tuple, list)):
        return type(value)(map_templates(inner, change) for inner in value)
    if isinstance(value, dict):
        return {key: map_templates(inner, change) for key, inner in value.items()}
    return value


@dataclass(frozen=True)
class OwnCode:
    """A module that computes in the model's own code, over our cache.

    name: in the block; "" is the block itself. call: what it is given beside hidden states, with a
    `Table` where that depends on the position. cache: the keyword under which it takes a cache of
    states, or None. attention: what it asks of transformers' attention interface, if it does so.
    reason: why its structure was not read.
    """

    name: str
    call: BlockCall
    cache: str | None
    attention: Attention | None
    reason: str


@dataclass(frozen=True)
class RouterSource:
    """A `Router` by the names of its tensors in the block."""

    weight: str
    top_k: int
    sigmoid: bool
    normalized: bool
    factor: float
    bias: str | None
    correction: str | None
    groups: int = 1
    kept: int = 1
    group_best: int = 1

    def of(self, tensors: Mapping[str, Tensor]) -> Router:
        """The router on tensors of these names; its weight is not copied."""

        def vector(name: str | None) -> Tensor | None:
            return None if name is None else tensors[name].detach().float().contiguous()

        return Router(
            tensors[self.weight].detach().contiguous(),
            self.top_k,
            self.sigmoid,
            self.normalized,
            self.factor,
            vector(self.bias),
            vector(self.correction),
            self.groups,
            self.kept,
            self.group_best,
        )


@dataclass(frozen=True)
class MlpPlan:
    """first: gate then up channels (gated), or the activation's input. last: the linear that ends
    the branch. module: the one that computes the whole branch in its own code, as a mixture of
    experts does; first and last then name it, too. reason: why it is not read, for other modules
    than mixtures. routed: the parts of such a mixture, where they are known; they run instead."""

    first: Source
    last: str
    gated: bool
    activation: Callable[[Tensor], Tensor]
    activation_name: str | None
    module: str | None = None
    reason: str = ""
    routed: Mixture | None = None

    @property
    def own_code(self) -> bool:
        """Whether a module of the model runs."""
        return self.module is not None and self.routed is None


@dataclass(frozen=True)
class Mixture:
    """A mixture that is a router and packed experts, and perhaps an MLP that every token goes
    through.

    experts: their module's name in the block. activation: its name in `ACTIVATIONS`, of act(gate) ·
    up. shared: the MLP whose output is added. shared_gate: the linear of one output whose sigmoid
    that output is multiplied by, or None.
    """

    experts: str
    router: RouterSource
    activation: str
    shared: MlpPlan | None = None
    shared_gate: str | None = None


@dataclass(frozen=True)
class BlockPlan:
    """One decoder block.

    qkv: query, key and value channels one after the other, those of a rotated head as two halves.
    own: what computes attention (or another mixer) instead of qkv, attention_out and the tables;
    where it is the block itself, all else is None. mlp: None where a block has no second branch.
    parallel: both branches read the block's input. factor: of both branches before they are added.
    Norms that a block lacks are None; mlp_norm None with parallel means that the MLP reads what
    attention reads. norms_sums: the post-norms are of the residual stream after each addition.
    """

    attention: Attention | None
    qkv: Source | None
    attention_out: str | None
    mlp: MlpPlan | None
    parallel: bool
    factor: float
    attention_norm: Norm | None
    attention_post_norm: Norm | None
    mlp_norm: Norm | None
    mlp_post_norm: Norm | None
    cos: Tensor | None = None  # float32 [positions, rotary/2]
    sin: Tensor | None = None
    own: OwnCode | None = None
    norms_sums: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of all modules in the block that the plan runs, but those in the model's own code."""
        found = () if self.qkv is None else self.qkv.names
        found += () if self.attention_out is None else (self.attention_out,)
        if self.mlp is None:
            return found
        return (*found, *self.mlp.first.names, self.mlp.last)

    @property
    def whole(self) -> bool:
        """Whether the block itself runs in its own code."""
        return self.own is not None and not self.own.name


@dataclass(frozen=True)
class DecoderPlan:
    """embedding: token ids → vectors; they are multiplied by embedding_factor, added to positions
    [positions, features] if the model has absolute ones, and normalized by embedding_norm.
    counts_padding: the positions of a row include its padding on the left. Logits are head(norm(x))
    · logits_factor, then soft-capped. states: makes an empty cache of states for the mixers that
    keep some of their own, or None.
    """

    blocks: list[BlockPlan]
    modules: list[nn.Module]
    embedding: nn.Module
    embedding_factor: float
    positions: Tensor | None
    embedding_norm: Norm | None
    counts_padding: bool
    norm: Norm | None
    head: nn.Module
    logits_factor: float
    logits_softcap: float | None
    max_seq_len: int
    states: Callable[[], Any] | None = None

    @property
    def has_own_code(self) -> bool:
        """Whether any block runs a module of the model in its own code."""
        return any(b.own is not None or (b.mlp and b.mlp.own_code) for b in self.blocks)

    @property
    def own_parts(self) -> dict[str, int]:
        """Why → in how many blocks a part other than a mixture runs in the model's own code."""
        reasons = [block.own.reason for block in self.blocks if block.own is not None]
        reasons += [block.mlp.reason for block in self.blocks if block.mlp and block.mlp.reason]
        return dict(Counter(reasons))
