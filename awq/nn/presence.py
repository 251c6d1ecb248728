"""Where the weights of a model's blocks are while nobody works on them.

A model in memory has them all. Of one that is larger than memory, the blocks stand on the meta
device: they have shapes and no values. A `BlockStore` brings a block's weights for as long as it is
visited and takes the result away afterwards, so that one block is in memory at a time. It also
keeps what a later run needs to go on behind the last finished block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from awq.config import AwqConfig
from awq.nn.blocks import BlockList
from awq.nn.expert_shape import ExpertShape
from awq.nn.hidden import Room


@dataclass
class Progress:
    """A quantization between two blocks.

    finished: number of blocks that are done. hidden: name → hidden states [rows, tokens, features]
    before the next one, batch by batch. quantized: full names of the linears that were quantized.
    notes: all else, as JSON holds it.
    """

    finished: int
    hidden: dict[str, Sequence[Tensor]]
    quantized: list[str]
    notes: dict[str, Any] = field(default_factory=dict)


class BlockStore(Protocol):
    """What a walk and the quantizer ask of whoever keeps the blocks of a model.

    room: what memory the hidden states of the calibration may take; None: without a limit.
    phase: times what is done inside under a name. ahead: whether blocks are read and written while
    others are worked on, for the host's cores and memory are free then. folder: where finished
    blocks are written; None: nowhere.
    """

    @property
    def folder(self) -> Path | None: ...

    room: Room | None
    phase: Callable[[str], AbstractContextManager[None]]
    ahead: bool

    def begin(
        self,
        lists: Sequence[BlockList],
        targets: Collection[str],
        config: AwqConfig,
    ) -> None:
        """Told once, before any block is visited.

        lists: those whose blocks will be visited, in this order. All other blocks get their weights
        now, for calibration may run through them. targets: full names of the linears that will be
        quantized; it may lose members until the first visit. config: how they will be stored.
        """

    def go_on(self, settings: dict[str, Any], progress: Callable[[], Progress]) -> Progress | None:
        """Where an earlier run of the same settings got to, its blocks finished; None: nowhere.

        settings: all that decides about the result, as JSON holds it. progress: asked, each time a
        visit has ended, for what to keep. Raises CheckpointError when the earlier run had other
        settings, naming them.
        """

    def visited(self, name: str, block: nn.Module) -> AbstractContextManager[None]:
        """The block's weights are there inside; what it has become is kept when the visit ends
        without an error."""

    def why_not_expose(self, name: str, original: nn.Module, shape: ExpertShape) -> str | None:
        """`awq.nn.expose.why_not_expose` for a module of fused experts, on its true weights."""
