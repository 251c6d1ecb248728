"""Models larger than memory: blocks come from their files one at a time and leave into files.

A block's weights are read when it is visited (`stored_blocks`). When its visit ends, its tensors go
into a file of their own, under the names that a save would give them, and the block stands on the
meta device again.

Blocks are also *called* without being visited: to learn which of them a model reaches and what they
return. Only the structure of the output counts there, so such calls run on the meta device
(`meta_calls`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from awq.checkpoint.meta_calls import call_as_shapes, refuse_calls
from awq.checkpoint.save import names_on_disk, tensors_on_disk, without_second_names
from awq.checkpoint.shards import Parts
from awq.checkpoint.source import Source
from awq.checkpoint.stored_blocks import StoredBlocks
from awq.checkpoint.work_folder import WorkFolder
from awq.config import AwqConfig
from awq.core.team import present_team
from awq.errors import ModelError
from awq.nn.blocks import BlockList, block_names
from awq.nn.copies import copy_structure
from awq.nn.expert_shape import ExpertShape
from awq.nn.experts import named_experts
from awq.nn.expose import conceal_experts, expose_experts, why_not_expose
from awq.nn.hidden import Room
from awq.nn.linear import WQLinear
from awq.nn.packed_experts import pack_experts
from awq.nn.presence import Progress
from awq.nn.surgery import linear_shape, replace_module


class StreamedBlocks:
    """The blocks of a model in their files: a `BlockStore` (`awq.nn.presence`).

    model: on the CPU, its blocks on the meta device. work: where finished blocks are written, each
    into a file of its own, and the progress.
    """

    def __init__(
        self,
        source: Source,
        work: WorkFolder | None,
        dtype: Any = "auto",
        kind: Any = None,
    ) -> None:
        """source: a full-precision checkpoint; work: None for a model that is only looked at;
        dtype, kind: of `load_model`.

        Raises ConfigError or ModelError for a model that cannot be streamed, and what `load_model`
        raises.
        """
        self._stored = StoredBlocks(source, dtype, kind)
        self.path, self.lists = self._stored.path, self._stored.lists
        self._work = work
        self.room: Room | None = None
        self.phase: Callable[[str], AbstractContextManager[None]] = lambda _name: nullcontext()
        self.ahead = False

        # Reads and writes one after the other, in the order in which they were asked for.
        self._aside = ThreadPoolExecutor(1, "awq-blocks")
        self._coming: dict[str, Future[nn.Module]] = {}
        self._written: Future[None] | None = None
        self._progress: Callable[[], Progress] | None = None
        self.model: Any = copy_structure(self._stored.model)
        for name in self._stored.names:
            call_as_shapes(self.model.get_submodule(name))

    # What a walk asks for

    def begin(
        self,
        lists: Sequence[BlockList],
        targets: Collection[str],
        config: AwqConfig,
    ) -> None:
        """See `BlockStore.begin`."""
        self._config = config
        visited = [name for entry in lists for name in block_names(entry)]

        # An encoder's quantized blocks run again when the decoder's inputs are recorded.
        self._run_later = set(visited) - set(block_names(lists[-1]))
        self._visited, self._targets = visited, targets
        for name in self._stored.names:
            if name not in visited:
                block = self.model.get_submodule(name)
                self._fill(name, block)
                del block.forward

    def go_on(self, settings: dict[str, Any], progress: Callable[[], Progress]) -> Progress | None:
        """See `BlockStore.go_on`."""
        weights = {"dtype": str(self.model.dtype), "weights": self._stored.hash_of_weights()}
        self.work.check_settings(settings | weights)
        self._progress = progress
        team = present_team()
        team.wait()  # for the process that makes the folder
        found = self.work.load_progress()
        team.wait()  # before that process changes it

        if found is not None:
            for number, name in enumerate(self._visited[: found.finished]):
                self._finish_again(number, name, found.quantized)

        return found

    def _finish_again(self, number: int, name: str, quantized: Sequence[str]) -> None:
        """Brings a block into the state that it had when an earlier run was done with it."""
        block = self.model.get_submodule(name)
        stays = name in self._run_later
        if stays:
            self._fill(name, block)
        for full_name in quantized:
            if full_name.startswith(f"{name}."):
                inner = full_name.removeprefix(f"{name}.")
                replace_module(block, inner, self._packed_like(block.get_submodule(inner)))

        if stays:
            block.load_state_dict(self.work.block_that_runs_again(number), assign=True)
            del block.forward
        else:
            pack_experts(block)
            conceal_experts(block)
            # Inputs of the list that it belongs to may have to be recorded once more.
            call_as_shapes(block, self._stored.model.get_submodule(name))

    def _packed_like(self, linear: Any) -> WQLinear:
        """An empty packed linear in the place of a dense one."""
        inputs, outputs = linear_shape(linear)
        bias = getattr(linear, "bias", None) is not None
        size, form = self._config.group_size_of(inputs), self._config.format
        return WQLinear(inputs, outputs, bias, size, form, "meta", linear.weight.dtype)

    @contextmanager
    def visited(self, name: str, block: nn.Module) -> Iterator[None]:
        """See `BlockStore.visited`."""
        with self.phase("reading"):
            self._fill(name, block)
        self._read_ahead(name)
        del block.forward
        yield
        with self.phase("writing"):
            self._finish(name, block)

    def _finish(self, name: str, block: nn.Module) -> None:
        """Writes a block that is done, and takes its weights away."""
        stays = name in self._run_later
        finished = copy_structure(block) if stays else block
        pack_experts(finished)
        conceal_experts(finished)
        state = without_second_names(finished, finished.state_dict())
        tensors = {f"{name}.{key}": tensor for key, tensor in state.items()}
        tensors = tensors_on_disk(self.model, tensors, self._names_on_disk)
        self._write(tensors, block.state_dict() if stays else None)

        if self._progress is not None and self.work.is_due:
            self._wait_for_writing()
            self.work.save_progress(self._progress())

        if not stays:
            block.to("meta")
            refuse_calls(block, name)

    def _write(self, tensors: dict[str, Tensor], runs_again: dict[str, Tensor] | None) -> None:
        """Of `WorkFolder.add_block`; while the next block is worked on, where `ahead`."""
        self._wait_for_writing()
        if self.ahead:
            self._written = self._aside.submit(self.work.add_block, tensors, runs_again)
        else:
            self.work.add_block(tensors, runs_again)

    def _wait_for_writing(self) -> None:
        """Until all blocks are on the disk. Raises what their writing raised."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def why_not_expose(self, name: str, original: nn.Module, shape: ExpertShape) -> str | None:
        """See `BlockStore.why_not_expose`."""
        owner = self._stored.owner(name)
        if owner is None:
            return why_not_expose(original, shape)
        experts = self._stored.filled(owner).get_submodule(name.removeprefix(f"{owner}."))
        return why_not_expose(experts, shape)

    # What a save asks for

    @cached_property
    def _names_on_disk(self) -> dict[str, bool]:
        return names_on_disk(self.model, self._targets)

    @property
    def work(self) -> WorkFolder:
        if self._work is None:
            raise ModelError(f"{self.path} was opened to be looked at; its blocks have no place.")
        return self._work

    @property
    def folder(self) -> Path | None:
        """See `BlockStore`."""
        return None if self._work is None else self._work.path

    def parts(self) -> Parts:
        """The model when all of its blocks were visited."""
        self._wait_for_writing()
        inside = tuple(f"{name}." for name in self._visited)
        state = self.model.state_dict()
        rest = {name: tensor for name, tensor in state.items() if not name.startswith(inside)}
        return Parts(self.work.blocks, rest, self._names_on_disk)

    # Reading

    def _read_ahead(self, name: str) -> None:
        """Gets the block that comes next while this one is worked on: its weights where `ahead`,
        else their pages into the system's cache."""
        place = self._visited.index(name) + 1
        if place == len(self._visited):
            return
        if self.ahead:
            following = self._visited[place]
            self._coming[following] = self._aside.submit(self._stored.filled, following)
            return

        self._stored.advise(self._visited[place])

    def _fill(self, name: str, block: nn.Module) -> None:
        """Gives a block of `model` its weights; experts are linears where they are so in it."""
        coming = self._coming.pop(name, None)
        filled = self._stored.filled(name) if coming is None else coming.result()
        exposed = {inner: experts.names for inner, experts in named_experts(block).items()}
        expose_experts(filled, exposed, lambda *_: None)  # judged when the model was exposed
        filled.eval()
        for content in ("_modules", "_parameters", "_buffers"):
            block.__dict__[content] = filled.__dict__[content]
