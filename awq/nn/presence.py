"""Where the weights of a model's blocks are while nobody works on them.

A model in memory has them all. Of one that is larger than memory, the blocks stand on the meta
device: they have shapes and no values. A `BlockStore` brings a block's weights for as long as it is
visited and takes the result away afterwards, so that one block is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from awq.nn.blocks import BlockList
from awq.nn.experts import ExpertShape


class BlockStore(Protocol):
    """What a walk and the quantizer ask of whoever keeps the blocks of a model."""

    def begin(self, lists: Sequence[BlockList], targets: Collection[str]) -> None:
        """Told once, before any block is visited.

        lists: those whose blocks will be visited, in this order. All other blocks get their weights
        now, for calibration may run through them. targets: full names of the linears that will be
        quantized; it may lose members until the first visit.
        """

    def visited(self, name: str, block: nn.Module) -> AbstractContextManager[None]:
        """The block's weights are there inside; what it has become is kept when the visit ends
        without an error."""

    def why_not_expose(self, name: str, original: nn.Module, shape: ExpertShape) -> str | None:
        """`awq.nn.experts.why_not_expose` for a module of fused experts, on its true weights."""
