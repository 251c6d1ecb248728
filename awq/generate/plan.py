"""What a decoder is made of, as plain data: found on the model in `read`, proven by `prove`,
carried out in `run`.

Plans are frozen: they are made when everything is known, and nobody changes them afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from awq.errors import AwqError
from awq.kernels.specs import Attention as Attention
from awq.kernels.specs import Norm as Norm


class NotFusable(AwqError):
    """Why a model keeps transformers' own loop."""


@dataclass(frozen=True)
class Source:
    """Sibling linears, by name in the block, whose concatenated outputs hold the wanted channels at
    `rows` [wanted]."""

    names: tuple[str, ...]
    rows: Tensor


@dataclass(frozen=True)
class BlockPlan:
    """One decoder block.

    qkv: query, key and value channels one after the other, those of a rotated head as two halves.
    mlp_in: gate then up channels (gated), or the activation's input. parallel: attention and MLP
    both read the block's input. factor: of both branches before they are added. Norms that a block
    lacks are None; mlp_norm None with parallel means that the MLP reads
    what attention reads. mixture: the module that routes tokens to packed experts and adds up what
    they give, where a block has one instead of an MLP; mlp_in and mlp_out then name it, too.
    """

    attention: Attention
    qkv: Source
    attention_out: str
    mlp_in: Source
    mlp_out: str
    gated: bool
    activation: Callable[[Tensor], Tensor]
    activation_name: str | None
    parallel: bool
    factor: float
    attention_norm: Norm | None
    attention_post_norm: Norm | None
    mlp_norm: Norm | None
    mlp_post_norm: Norm | None
    cos: Tensor | None = None  # float32 [positions, rotary/2]
    sin: Tensor | None = None
    mixture: str | None = None


@dataclass(frozen=True)
class DecoderPlan:
    """embedding: token ids → vectors; they are multiplied by embedding_factor and, if the model has
    absolute positions, added to positions [positions, features]. Logits are head(norm(x)) ·
    logits_factor, then soft-capped."""

    blocks: list[BlockPlan]
    modules: list[nn.Module]
    embedding: nn.Module
    embedding_factor: float
    positions: Tensor | None
    norm: Norm | None
    head: nn.Module
    logits_factor: float
    logits_softcap: float | None
    max_seq_len: int
