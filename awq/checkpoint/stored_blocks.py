"""The blocks of a full-precision checkpoint, read from its files one at a time.

transformers builds the model on the meta device, with every name, shape and dtype that loading
would give it, and says what is missing or left over; no weight is read for that. What lies outside
the repeated blocks is then loaded for good. A block's weights come through transformers' own
conversions (renamed modules, experts joined into one tensor), so that the block is bit for bit the
one of a model in memory.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
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
from awq.checkpoint.source import Source
from awq.errors import CheckpointError, ConfigError, ModelError
from awq.nn.blocks import find_block_lists
from awq.nn.copies import copy_structure
from awq.nn.surgery import replace_module

Headers = Mapping[str, Mapping[str, Any]]
_HASHED_VALUES = 1024


class StoredBlocks:
    """A full-precision model with its blocks left in their files.

    model: what lies in no block is on the CPU, the blocks are on the meta device. path: its
    directory or name on a hub. headers: by name in the files. lists: of repeated blocks. names: of
    all blocks. members: block → names in the files of what it is made of; "" for all that is in no
    block.
    """

    def __init__(self, source: Source, dtype: Any = "auto", kind: Any = None) -> None:
        """source, dtype, kind: of `load_model`.

        Raises ConfigError or ModelError for a model whose blocks cannot be read one by one, and
        what `load_model` raises.
        """
        _check_transformers()
        self.model: Any = load_model(source, dtype, kind=kind, device_map={"": "meta"})
        if source.directory is None:  # it has been downloaded meanwhile
            source = Source.open(source.name, source.trust_remote_code, **source.download)

        self.path, self.headers = source.name, source.headers
        self.lists = find_block_lists(self.model)
        self.names = [f"{prefix}.{i}" for prefix, blocks in self.lists for i in range(len(blocks))]
        self._known_names = frozenset(self.names)
        self.check_unshared()
        self.members = self._members_of_blocks()
        self._load_outside()

    @torch.no_grad()  # which a thread does not inherit
    def filled(self, name: str) -> nn.Module:
        """The block of the original model, with its weights; the caller may keep it."""
        spare = copy_structure(self.model.get_submodule(name))
        self._load(self.members[name])
        filled = self.model.get_submodule(name)
        replace_module(self.model, name, spare)
        lacking = [key for key, tensor in filled.state_dict().items() if tensor.is_meta]
        if lacking:
            raise CheckpointError(f"{self.path} lacks {name}.{lacking[0]}; download it again.")

        check_finite(filled, f"{self.path}, {name},", ModelError)
        return filled

    def advise(self, name: str) -> None:
        """Gets a block's files into the system's cache, while something else is worked on."""
        members = self.members[name]
        ranges = []
        for path in {self.headers[stored]["file"] for stored in members}:
            ranges += [(path, span) for span in spans_of(path, members)]

        Thread(target=_advise, args=(ranges,), daemon=True).start()

    def hash_of_weights(self) -> str:
        """Of all names, dtypes and shapes, and of the first values of every tensor: reading all of
        a large model would take minutes, and no training leaves the beginning of every tensor as it
        was."""
        digest = hashlib.sha256()
        files: dict[Path, list[str]] = {}
        for name in sorted(self.headers):
            files.setdefault(self.headers[name]["file"], []).append(name)

        for path, names in files.items():
            with safe_open(path, "pt") as file:
                for name in names:
                    part = file.get_slice(name)
                    digest.update(f"{name} {part.get_dtype()} {part.get_shape()}".encode())
                    first = file.get_tensor(name).flatten()[:_HASHED_VALUES]
                    digest.update(first.contiguous().view(torch.uint8).numpy().tobytes())

        return digest.hexdigest()

    def _load(self, names: Iterable[str]) -> set[str]:
        """Puts stored tensors into the original model; returns which of its own got nothing."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        settings = LoadStateDictConfig(
            device_map={"": "cpu"},
            dtype=self.model.dtype,
            weight_mapping=conversions_of(self.model),
        )
        load = convert_and_load_state_dict_in_model
        plans = {}
        if "tp_plan" in inspect.signature(load).parameters:  # transformers 5.0
            plans = {"tp_plan": None, "dtype_plan": self.model.dtype_plan}
        with no_progress_bars():  # one would come for every block
            found, *_ = load(self.model, _read(self.headers, names), settings, **plans)

        return set(getattr(found, "missing_keys", found))

    def _load_outside(self) -> None:
        """Loads what lies in no block, makes what the files do not hold, and ties what is tied."""
        model, known = self.model, self.model._weight_conversions
        inside = tuple(f"{name}." for name in self.names)
        missing = self._load(self.members[""])
        model._weight_conversions = known  # of the whole model: a save reverts them
        outside = {name for name in missing if not name.startswith(inside)}
        model._move_missing_keys_from_meta_to_device(outside, {"": "cpu"}, None, None)
        for module in model.modules():
            module.__dict__.pop("_is_hf_initialized", None)

        model._initialize_missing_keys(False)
        model.tie_weights(missing_keys=outside, recompute_mapping=False)
        check_finite(model, self.path, ModelError)

    def _members_of_blocks(self) -> dict[str, list[str]]:
        """Block → names in the files of what it is made of; "" for all that is in no block."""
        members: dict[str, list[str]] = {name: [] for name in ["", *self.names]}
        for stored, name in loaded_names(self.model, self.headers).items():
            members[self.owner(name) or ""].append(stored)
        return members

    def owner(self, name: str) -> str | None:
        """The block that a module or tensor belongs to."""
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
        return next((prefix for prefix in prefixes if prefix in self._known_names), None)

    def check_unshared(self) -> None:
        """Refuses blocks that share weights: one that has left could not lend them."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        for name in (*tied, *tied.values()):
            if self.owner(name) is not None:
                raise ModelError(
                    f"{self.path} cannot be streamed: {name} of a block is tied to another weight; "
                    "quantize it in memory."
                )

        owners: dict[nn.Parameter, str | None] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owner = self.owner(name)
            if owners.setdefault(parameter, owner) != owner:
                raise ModelError(
                    f"{self.path} cannot be streamed: {name} is shared between blocks; quantize it "
                    "in memory."
                )


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


def _check_transformers() -> None:
    try:
        from transformers import core_model_loading  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "streaming needs transformers 5 or newer; quantize the model in memory."
        ) from error
