"""Work that several processes divide, and whose result has the bytes of one process's.

Every process holds the same state and takes the same steps. What is expensive is cut into pieces
whose shapes do not depend on how many processes there are; each piece is computed by one of them,
and all get it. A sum is never cut: rows of a Gram matrix are pieces, tokens are not. So numbers are
added in the same order, whoever adds them.

Processes are those of `torch.distributed`, as torchrun starts them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from awq.errors import ConfigError

Named = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Team:
    """The processes that share one quantization. rank: of this one; size: how many there are; here:
    how many of them on this machine."""

    rank: int = 0
    size: int = 1
    here: int = 1

    def has(self, number: int) -> bool:
        """Whether a piece is this process's. Numbers are dealt there and back (0, 1, 1, 0, …), so
        that pieces which grow or shrink make no process's work the largest."""
        return self.rank == self._owner(number)

    def _owner(self, number: int) -> int:
        place = number % (2 * self.size)
        return min(place, 2 * self.size - 1 - place)

    def hand_out(self, tensor: Tensor, number: int) -> None:
        """Gives all processes, in place, the piece that one of them has; the tensor is
        contiguous."""
        if self.size > 1:
            from torch import distributed

            distributed.broadcast(tensor, self._owner(number))

    def total(self, tensor: Tensor) -> None:
        """Adds up, in place, what the processes have made of their pieces of a tensor. Elsewhere
        each has zeros, so that no number is rounded."""
        if self.size > 1 and tensor.numel():
            from torch import distributed

            distributed.all_reduce(tensor)

    def each(
        self,
        count: int,
        make: Callable[[int], Named],
        device: torch.device,
    ) -> Iterator[Named]:
        """What `make` gives for 0 … count − 1, in this order: names and tensors on `device`. Each
        is made by one process.

        The next one is made while the last ones travel, so `make` must not depend on what the
        caller does with them.
        """
        if self.size == 1:
            yield from map(make, range(count))
            return

        last: _Exchange | None = None
        for first in range(0, count, self.size):
            number = first + self.rank
            own = make(number) if number < count else []
            arrived = [] if last is None else last.ended()
            last = self._exchange(own, device, count - first)
            yield from arrived
        if last is not None:
            yield from last.ended()

    def is_maker(self, number: int) -> bool:
        """Whether this process is the one that makes it, in `each`."""
        return number % self.size == self.rank

    def rows(
        self,
        parts: Sequence[Any],
        make: Callable[[Any], tuple[Tensor, ...]],
        device: torch.device,
    ) -> tuple[Tensor, ...]:
        """What `make` gives for every part, its tensors joined by rows."""
        made = self.each(len(parts), lambda i: [("", t) for t in make(parts[i])], device)
        joined = zip(*([tensor for _, tensor in found] for found in made))
        return tuple(rows[0] if len(rows) == 1 else torch.cat(rows) for rows in joined)

    def wait(self) -> None:
        """Until all processes have come as far."""
        if self.size > 1:
            from torch import distributed

            distributed.barrier()

    def _exchange(self, own: Named, device: torch.device, wanted: int) -> _Exchange:
        """Begins to give all processes what each has made; of `wanted` ranks it is wanted. All
        send and receive at once, as bytes: not every dtype is known everywhere."""
        from torch import distributed

        found = []
        transfers = []
        for rank, shapes in enumerate(self._shapes_of_all(own)):
            if rank == self.rank:
                found.append([(name, tensor.detach().contiguous()) for name, tensor in own])
                continue

            empty = [
                (name, torch.empty(size, dtype=dtype, device=device))
                for name, size, dtype in shapes
            ]
            found.append(empty)
            transfers += _transfers(distributed.irecv, empty, rank)

        for rank in range(self.size):
            if rank != self.rank:
                transfers += _transfers(distributed.isend, found[self.rank], rank)

        begun = distributed.batch_isend_irecv(transfers) if transfers else []
        return _Exchange(found[:wanted], begun)

    def _shapes_of_all(self, own: Named) -> list[list[tuple[str, torch.Size, torch.dtype]]]:
        from torch import distributed

        shapes = [(name, tensor.shape, tensor.dtype) for name, tensor in own]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, shapes)
        return found


class _Exchange(NamedTuple):
    """What the processes have made, by rank, and the transfers that bring it."""

    made: list[Named]
    transfers: list[Any]

    def ended(self) -> list[Named]:
        for transfer in self.transfers:
            transfer.wait()
        return self.made


def _transfers(kind: Callable[..., Any], tensors: Named, other: int) -> list[Any]:
    """One transfer for each tensor that is not empty, to or from another process."""
    from torch import distributed

    whole = [tensor.view(-1).view(torch.uint8) for _, tensor in tensors if tensor.numel()]
    return [distributed.P2POp(kind, part, other, tag=tag) for tag, part in enumerate(whole)]


ALONE = Team()
_present: ContextVar[Team] = ContextVar("team", default=ALONE)


def present_team() -> Team:
    """The team of the quantization that runs here; of this process alone outside of
    `several_processes`."""
    return _present.get()


@contextmanager
def several_processes() -> Iterator[Team]:
    """Quantizations inside are divided by all processes that torchrun started, each on its own GPU
    where there are GPUs.

    All of them must make the same calls, and one alone may write a model that is in memory: that of
    rank 0. A process group that exists already is used. Raises ConfigError where none can be made,
    or where a machine has fewer GPUs than processes.
    """
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(_own_gpu())
    begun = not distributed.is_initialized()
    if begun:
        kinds = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            distributed.init_process_group(kinds)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"the processes do not find each other: {error}") from error

    size = distributed.get_world_size()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    token = _present.set(Team(distributed.get_rank(), size, here))
    try:
        yield present_team()
    finally:
        _present.reset(token)
        if begun:
            distributed.destroy_process_group()


def _own_gpu() -> int:
    """The GPU of this process. Every process of a machine raises ConfigError where there are not
    enough for all of them, so that none waits for another."""
    gpus = torch.cuda.device_count()
    number = int(os.environ.get("LOCAL_RANK", "0"))
    here = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), number + 1)
    if here > gpus:
        raise ConfigError(
            f"{here} processes were started for {gpus} GPU{'s' * (gpus > 1)}, and each takes one; "
            f"start {gpus} (torchrun --nproc-per-node {gpus}), or hide the GPUs from them "
            '(CUDA_VISIBLE_DEVICES="") to work on the CPU.'
        )
    return number


def was_started_in_a_team() -> bool:
    """Whether torchrun started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
