"""Models larger than memory: blocks come from their files one at a time and leave into files.

transformers builds the model on the meta device, with every name, shape and dtype that loading
would give it, and says what is missing or left over; no weight is read for that. What lies outside
the repeated blocks is then loaded for good. A block's weights are read when it is visited, through
transformers' own conversions (renamed modules, experts joined into one tensor), so that the block
is bit for bit the one of a model in memory. When its visit ends, its tensors go into a file of
their own, under the names that a save would give them, and the block stands on the meta device
again.

Blocks are also *called* without being visited: to learn which of them a model reaches and what they
return. Only the structure of the output counts there, so such calls run on the meta device.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cached_property, partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from awq._bars import no_progress_bars
from awq.checkpoint.account import check_finite
from awq.checkpoint.files import spans_of
from awq.checkpoint.load import load_model
from awq.checkpoint.match import conversions_of
from awq.checkpoint.save import names_on_disk, tensors_on_disk, without_second_names
from awq.checkpoint.shards import Parts
from awq.checkpoint.source import Source
from awq.checkpoint.work_folder import WorkFolder
from awq.config import AwqConfig
from awq.core.team import present_team
from awq.errors import CheckpointError, ConfigError, ModelError
from awq.nn.block_calls import map_tensors
from awq.nn.blocks import BlockList, block_names, find_block_lists
from awq.nn.copies import copy_structure
from awq.nn.expert_shape import ExpertShape
from awq.nn.experts import named_experts
from awq.nn.expose import conceal_experts, expose_experts, why_not_expose
from awq.nn.hidden import Room
from awq.nn.linear import WQLinear
from awq.nn.packed_experts import pack_experts
from awq.nn.presence import Progress
from awq.nn.surgery import linear_shape, replace_module

logger = logging.getLogger("awq.checkpoint")

Headers = Mapping[str, Mapping[str, Any]]
_HASHED_VALUES = 1024


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
        _check_transformers()
        self._original: Any = load_model(source, dtype, kind=kind, device_map={"": "meta"})
        if source.directory is None:  # it has been downloaded meanwhile
            source = Source.open(source.name, source.trust_remote_code, **source.download)

        self.path, self._headers = source.name, source.headers
        self._work = work
        self.room: Room | None = None
        self.phase: Callable[[str], AbstractContextManager[None]] = lambda _name: nullcontext()
        self.ahead = False

        # Reads and writes one after the other, in the order in which they were asked for.
        self._aside = ThreadPoolExecutor(1, "awq-blocks")
        self._coming: dict[str, Future[nn.Module]] = {}
        self._written: Future[None] | None = None
        self._progress: Callable[[], Progress] | None = None
        self.lists = find_block_lists(self._original)
        self._names = [f"{prefix}.{i}" for prefix, blocks in self.lists for i in range(len(blocks))]
        self._known_names = frozenset(self._names)
        self._check_unshared()
        self._members = self._members_of_blocks()
        self._load_outside()
        self.model: Any = copy_structure(self._original)
        for name in self._names:
            self._call_as_shapes(name, self.model.get_submodule(name))

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
        for name in self._names:
            if name not in visited:
                block = self.model.get_submodule(name)
                self._fill(name, block)
                del block.forward

    def go_on(self, settings: dict[str, Any], progress: Callable[[], Progress]) -> Progress | None:
        """See `BlockStore.go_on`."""
        weights = {"dtype": str(self.model.dtype), "weights": hash_of_weights(self._headers)}
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
            block.forward = partial(_structure_of_output, self._original.get_submodule(name))

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
            block.forward = partial(_gone, name)

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
        owner = self._owner(name)
        if owner is None:
            return why_not_expose(original, shape)
        experts = self._filled(owner).get_submodule(name.removeprefix(f"{owner}."))
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
            self._coming[following] = self._aside.submit(self._filled, following)
            return

        members = self._members[self._visited[place]]
        ranges = []
        for path in {self._headers[stored]["file"] for stored in members}:
            ranges += [(path, span) for span in spans_of(path, members)]

        Thread(target=_advise, args=(ranges,), daemon=True).start()

    def _fill(self, name: str, block: nn.Module) -> None:
        """Gives a block of `model` its weights; experts are linears where they are so in it."""
        coming = self._coming.pop(name, None)
        filled = self._filled(name) if coming is None else coming.result()
        exposed = {inner: experts.names for inner, experts in named_experts(block).items()}
        expose_experts(filled, exposed, lambda *_: None)  # judged when the model was exposed
        filled.eval()
        for content in ("_modules", "_parameters", "_buffers"):
            block.__dict__[content] = filled.__dict__[content]

    @torch.no_grad()  # which a thread does not inherit
    def _filled(self, name: str) -> nn.Module:
        """The block of the original model, with its weights; the caller may keep it."""
        spare = copy_structure(self._original.get_submodule(name))
        self._load(self._members[name])
        filled = self._original.get_submodule(name)
        replace_module(self._original, name, spare)
        lacking = [key for key, tensor in filled.state_dict().items() if tensor.is_meta]
        if lacking:
            raise CheckpointError(f"{self.path} lacks {name}.{lacking[0]}; download it again.")

        check_finite(filled, f"{self.path}, {name},", ModelError)
        return filled

    def _load(self, names: Iterable[str]) -> set[str]:
        """Puts stored tensors into the original model; returns which of its own got nothing."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        settings = LoadStateDictConfig(
            device_map={"": "cpu"},
            dtype=self._original.dtype,
            weight_mapping=conversions_of(self._original),
        )
        load = convert_and_load_state_dict_in_model
        plans = {}
        if "tp_plan" in inspect.signature(load).parameters:  # transformers 5.0
            plans = {"tp_plan": None, "dtype_plan": self._original.dtype_plan}
        with no_progress_bars():  # one would come for every block
            found, *_ = load(self._original, _read(self._headers, names), settings, **plans)

        return set(getattr(found, "missing_keys", found))

    def _load_outside(self) -> None:
        """Loads what lies in no block, makes what the files do not hold, and ties what is tied."""
        model, known = self._original, self._original._weight_conversions
        inside = tuple(f"{name}." for name in self._names)
        missing = self._load(self._members[""])
        model._weight_conversions = known  # of the whole model: a save reverts them
        outside = {name for name in missing if not name.startswith(inside)}
        model._move_missing_keys_from_meta_to_device(outside, {"": "cpu"}, None, None)
        for module in model.modules():
            module.__dict__.pop("_is_hf_initialized", None)

        model._initialize_missing_keys(False)
        model.tie_weights(missing_keys=outside, recompute_mapping=False)

    def _members_of_blocks(self) -> dict[str, list[str]]:
        """Block → names in the files of what it is made of; "" for all that is in no block."""
        members: dict[str, list[str]] = {name: [] for name in ["", *self._names]}
        for stored, name in loaded_names(self._original, self._headers).items():
            members[self._owner(name) or ""].append(stored)
        return members

    def _owner(self, name: str) -> str | None:
        """The block that a module or tensor belongs to."""
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
        return next((prefix for prefix in prefixes if prefix in self._known_names), None)

    def _check_unshared(self) -> None:
        """Refuses blocks that share weights: one that has left could not lend them."""
        tied = getattr(self._original, "all_tied_weights_keys", None) or {}
        for name in (*tied, *tied.values()):
            if self._owner(name) is not None:
                raise ModelError(
                    f"{self.path} cannot be streamed: {name} of a block is tied to another weight; "
                    "quantize it in memory."
                )

        owners: dict[nn.Parameter, str | None] = {}
        for name, parameter in self._original.named_parameters(remove_duplicate=False):
            owner = self._owner(name)
            if owners.setdefault(parameter, owner) != owner:
                raise ModelError(
                    f"{self.path} cannot be streamed: {name} is shared between blocks; quantize it "
                    "in memory."
                )

    # Calls outside visits

    def _call_as_shapes(self, name: str, block: nn.Module) -> None:
        block.forward = partial(_structure_of_output, block)


def loaded_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Name in the files → name in the model that transformers loads it into; of tensors that become
    several, the first."""
    from transformers.core_model_loading import rename_source_key

    steps = conversions_of(model)
    joinings = [step for step in steps if hasattr(step, "operations")]
    renamings = [step for step in steps if not hasattr(step, "operations")]
    base, state = model.base_model_prefix, model.state_dict()

    names = {}
    for name in stored:
        key, _ = rename_source_key(name, renamings, joinings, base, state)
        if key not in state and name in state:
            key, _ = rename_source_key(name, [], [], base, state)
        names[name] = key

    return names


def hash_of_weights(headers: Headers) -> str:
    """Of all names, dtypes and shapes, and of the first values of every tensor: reading all of a
    large model would take minutes, and no training leaves the beginning of every tensor as it
    was."""
    digest = hashlib.sha256()
    files: dict[Path, list[str]] = {}
    for name in sorted(headers):
        files.setdefault(headers[name]["file"], []).append(name)
    for path, names in files.items():
        with safe_open(path, "pt") as file:
            for name in names:
                part = file.get_slice(name)
                digest.update(f"{name} {part.get_dtype()} {part.get_shape()}".encode())
                first = file.get_tensor(name).flatten()[:_HASHED_VALUES]
                digest.update(first.contiguous().view(torch.uint8).numpy().tobytes())

    return digest.hexdigest()


def _read(headers: Headers, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of the files. The files are mapped as long as one of the tensors lives."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(headers[name]["file"], []).append(name)

    tensors: dict[str, Tensor] = {}
    for path, members in by_file.items():
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in members}

    return tensors


def _advise(ranges: Sequence[tuple[Path, tuple[int, int]]]) -> None:
    """Starts reading (file, [start, stop)) into the system's cache: none of it counts as this
    process's memory."""
    advise = getattr(os, "posix_fadvise", None)  # not on macOS and Windows
    if advise is None:
        return
    for path, (start, stop) in ranges:
        with suppress(OSError), path.open("rb") as file:
            advise(file.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)


def _structure_of_output(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Zeros in the structure and shapes of the block's output."""
    forward = type(block).forward
    try:
        on_meta = map_tensors((args, kwargs), lambda tensor: tensor.to("meta"))
        output = forward(block, *on_meta[0], **on_meta[1])
    except Exception as error:  # routing by values has none on the meta device
        logger.debug("%s cannot run without values: %s", type(block).__name__, error)
        with _zero_weights(block):
            output = forward(block, *args, **kwargs)
    return map_tensors(output, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))


@contextmanager
def _zero_weights(block: nn.Module) -> Iterator[None]:
    """Zeros that take no memory in place of the tensors on the meta device."""
    replaced: list[tuple[Any, str, Tensor]] = []
    for module in block.modules():
        held: tuple[Any, ...] = (module._parameters, module._buffers)
        for tensors in held:
            for name, tensor in list(tensors.items()):
                if tensor is not None and tensor.is_meta:
                    replaced.append((tensors, name, tensor))
                    zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(zeros, False) if is_parameter else zeros

    try:
        yield
    finally:
        for tensors, name, tensor in replaced:
            tensors[name] = tensor


def _gone(name: str, *_args: Any, **_kwargs: Any) -> Any:
    raise ModelError(f"{name} is quantized and written; it cannot be run any more.")


def _check_transformers() -> None:
    try:
        from transformers import core_model_loading  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "streaming needs transformers 5 or newer; quantize the model in memory."
        ) from error
