"""`Source`: a checkpoint, opened once.

Every door (loading, encoding, converting, `awq info`) needs the same answers about a checkpoint
before any weight is read: is it a directory or a model of the hub, in which folder does the
transformer lie, is it packed, with which settings, how long may an input be. `Source.open` finds
them once, checks the files while it is there, and is passed down.

Directories of sentence-transformers may keep the transformer in a folder of its own:
`awq.checkpoint.modules` knows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from awq._hub import ask_hub_once
from awq.checkpoint.files import (
    PackedTensors,
    cached_directory,
    check_directory,
    packed_among,
    tensor_headers,
    weight_files,
)
from awq.checkpoint.modules import body_directory, is_embedder
from awq.config import AwqConfig
from awq.errors import AwqError, CheckpointError, ConfigError, ModelError, first_line

HUB_ARGUMENTS = ("revision", "cache_dir", "token", "subfolder", "local_files_only")
# How configs name the longest input their positions allow, in the order in which they are asked.
POSITION_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
UNLIMITED = 1 << 24  # tokenizers without a limit say 10^30


@dataclass(frozen=True)
class Source:
    """A checkpoint whose files were looked at and whose config was read.

    name: directory or hub id, as given. directory: the local directory or the cached snapshot; None
    while a hub model is not
    in the cache. config: transformers' config. download: where on the hub it is, for further
    downloads.
    """

    name: str
    directory: Path | None
    config: Any
    trust_remote_code: bool = False
    download: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str | Path, trust_remote_code: bool = False, **download: Any) -> Source:
        """Opens a local directory or hub id. download: `revision`, `cache_dir`, `token`,
        `subfolder`, `local_files_only`.

        Raises ModelError when there is no such model, CheckpointError when its files are incomplete
        or broken.
        """
        directory = local_directory(name)
        if directory is not None:
            directory = directory / download.get("subfolder", "")
            check_directory(body_directory(directory))
        else:
            check_reachable(name, download)

        config = _read_config(name, directory, trust_remote_code, download)
        if directory is None:
            directory = cached_directory(str(name), getattr(config, "_commit_hash", None))
        return cls(str(name), directory, config, trust_remote_code, download)

    @classmethod
    def open_directory(cls, directory: str | Path) -> Source:
        """Opens a local directory; a name is never looked for on the hub. Raises like `open`, and
        for what is no directory."""
        if not isinstance(directory, (str, os.PathLike)) or not Path(directory).is_dir():
            raise CheckpointError(
                f"{directory} is not a directory; give the directory of a saved checkpoint."
            )
        return cls.open(directory)

    @property
    def location(self) -> str:
        """What transformers loads from: the folder of the transformer, or the hub id."""
        if self.directory is None or local_directory(self.name) is None:
            return self.name
        if self.download.get("subfolder"):
            return self.name
        return str(body_directory(self.directory))

    @cached_property
    def headers(self) -> dict[str, dict[str, Any]]:
        """Tensor name → {dtype, shape, file}; empty while a hub model is not in the cache."""
        if self.directory is not None:
            return tensor_headers(weight_files(body_directory(self.directory)))
        return {}

    @cached_property
    def packed(self) -> PackedTensors:
        """Headers of the packed linears."""
        return packed_among(self.headers)

    @property
    def is_quantized(self) -> bool:
        return getattr(self.config, "quantization_config", None) is not None

    @property
    def settings(self) -> AwqConfig:
        """How its weights are stored. Raises ConfigError when the config does not say so."""
        from awq.checkpoint.hf import storage_settings

        if not self.is_quantized:
            raise ConfigError(
                f"{self.name} is not quantized: its config has no quantization_config; quantize it "
                "first, or open it with from_pretrained."
            )
        return storage_settings(self.config.quantization_config)

    @property
    def is_embedder(self) -> bool:
        """Whether it is a sentence-transformers directory of a model for embeddings, not of a
        cross-encoder with its head."""
        return self.directory is not None and is_embedder(self.directory)

    @property
    def longest_input(self) -> int | None:
        """Tokens that the model's positions allow; None when the config says nothing."""
        return position_limit(self.config)


def local_directory(name: str | Path) -> Path | None:
    """The directory of that name, or None for what looks like a hub id.

    Raises ModelError for a path that is no directory, and for what is no name.
    """
    is_path = isinstance(name, (str, os.PathLike))
    if not is_path or "\0" in str(name):
        raise ModelError(f"the model's name is {name!r}; give a directory or a hub id.")
    if not str(name):
        raise ModelError("the model's name is empty; give a directory or a hub id.")
    if os.path.isdir(name):
        return Path(name)

    spelled_as_path = str(name).startswith((".", "/", "~"))
    if os.path.exists(name) or spelled_as_path:
        raise ModelError(f"model {name} does not exist as a directory.")
    return None


def check_reachable(name: str | Path, download: dict[str, Any] | None = None) -> None:
    """Raises ModelError for a name that is no directory, is not in the cache, and cannot be asked
    for: the commonest of these is a wrong path."""
    given = download or {}
    elsewhere = given.get("local_files_only") or given.get("cache_dir")
    if elsewhere or cached_directory(str(name), given.get("revision")) is not None:
        return
    try:
        ask_hub_once()
    except Exception as error:  # of the network, in whichever client this release uses
        raise ModelError(
            f"model {name} does not exist as a directory, and the hub cannot be asked for it "
            f"({first_line(error)})."
        ) from error


def _read_config(
    name: str | Path,
    directory: Path | None,
    trust_remote_code: bool,
    download: dict[str, Any],
) -> Any:
    place: Any = name
    others = dict(download)
    if directory is not None and not download.get("subfolder"):
        place = body_directory(directory)
        others.pop("subfolder", None)

    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **others)
    except AwqError:
        raise
    # config classes of a hundred authors fail in as many ways on values they did not expect
    except Exception as error:
        reason = first_line(error)
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ModelError(
                f"model {name} has code of its own beside its weights; read it, then pass "
                "trust_remote_code=True to run it."
            ) from error
        if directory is None:
            raise ModelError(
                f"model {name} does not exist as a directory, and the hub does not give it: "
                f"{reason}"
            ) from error
        raise ModelError(
            f"model {name} cannot be loaded: its config.json is refused: {reason}"
        ) from error


def position_limit(config: Any) -> int | None:
    """Longest input in tokens that a config's positions allow, or None; of a model of several
    parts, those of its text part."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for part in (config, text):
        for name in POSITION_NAMES:
            value = getattr(part, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < UNLIMITED:
                return value
    return None


def hub_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Those of the keyword arguments that say where on the hub, or in which folder, a model is."""
    return {name: given[name] for name in HUB_ARGUMENTS if name in given}
