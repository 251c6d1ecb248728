"""Hidden states between two blocks, batch by batch: in memory up to a budget, in files past it.

They are kept where the model is. A GPU that only works on blocks sees one batch at a time, so that
the number of calibration tokens costs none of its memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awq.core.team import present_team

ACTIVATIONS = "activations-"  # how the names of such files begin


@dataclass
class Room:
    """What memory hidden states may take, in bytes, and the folder of those that find none."""

    memory: int
    folder: Path

    def __post_init__(self) -> None:
        self._numbers = count()

    def take(self, size: int) -> bool:
        """Whether there is room for so many bytes, which are taken then."""
        fits = size <= self.memory
        self.memory -= size if fits else 0
        return fits

    def give_back(self, size: int) -> None:
        self.memory += size

    def new_file(self) -> Path:
        rank = present_team().rank  # several processes may share the folder
        return self.folder / f"{ACTIVATIONS}{rank:03d}-{next(self._numbers):06d}"


@dataclass(frozen=True)
class _Filed:
    """A tensor in a file of its own."""

    path: Path
    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> Tensor:
        """The tensor, mapped: its pages may leave memory again."""
        values = torch.from_file(str(self.path), False, self.shape.numel(), dtype=self.dtype)
        return values.view(self.shape)


class HiddenStates(Sequence[Tensor]):
    """Tensors [rows, tokens, features] on one device. room: shared by all that count together;
    None: memory without a limit.

    >>> states = HiddenStates([torch.zeros(1, 2, 4)], torch.device("cpu"))
    >>> len(states), states[0].shape
    (1, torch.Size([1, 2, 4]))
    """

    def __init__(
        self,
        tensors: Iterable[Tensor],
        home: torch.device,
        room: Room | None = None,
    ) -> None:
        self.home, self.room = home, room
        self._kept: list[Tensor | _Filed] = []
        for tensor in tensors:
            self.append(tensor)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, number: Any) -> Any:
        kept = self._kept[number]
        return kept.read() if isinstance(kept, _Filed) else kept

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(len(self)))

    def __setitem__(self, number: int, tensor: Tensor) -> None:
        self._forget(self._kept[number])
        self._kept[number] = self._keep(tensor)

    def append(self, tensor: Tensor) -> None:
        self._kept.append(self._keep(tensor))

    def on(self, device: torch.device, number: int) -> Tensor:
        """One of them in float32 on `device`."""
        return moved(self[number], device)

    @property
    def shapes(self) -> list[torch.Size]:
        return [kept.shape for kept in self._kept]

    def clear(self) -> None:
        """Forgets all of them, and removes their files."""
        for kept in self._kept:
            self._forget(kept)
        self._kept = []

    def _keep(self, tensor: Tensor) -> Tensor | _Filed:
        tensor = _brought(tensor, self.home)
        if self.room is None or self.room.take(tensor.nbytes):
            return tensor
        path = self.room.new_file()
        tensor.contiguous().view(torch.uint8).numpy().tofile(path)
        return _Filed(path, tensor.shape, tensor.dtype)

    def _forget(self, kept: Tensor | _Filed) -> None:
        if isinstance(kept, _Filed):
            kept.path.unlink(missing_ok=True)
        elif self.room is not None:
            self.room.give_back(kept.nbytes)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """In float32 on `device`. A copy to a GPU may end later, for what reads it is queued there."""
    return tensor.to(device, non_blocking=device.type == "cuda").float()


def _brought(tensor: Tensor, home: torch.device) -> Tensor:
    """From a GPU to the host into locked pages: both ways are several times as fast then."""
    if home.type != "cpu" or not tensor.is_cuda:
        return tensor.to(home)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor)
