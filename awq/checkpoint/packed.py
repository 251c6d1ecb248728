"""Reading packed linears from the files of a checkpoint, one at a time, without a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from awq.checkpoint import compressed_tensors
from awq.checkpoint.account import is_finite
from awq.checkpoint.files import PackedTensors, check_complete
from awq.checkpoint.match import fits_dtype
from awq.checkpoint.modules import body_directory
from awq.checkpoint.source import Source
from awq.config import COMPRESSED_TENSORS, PACKED_TENSORS, AwqConfig
from awq.core.weight import QuantizedWeight
from awq.errors import CheckpointError, ConfigError
from awq.formats import get_format
from awq.formats.gemv_fast import zeros_are_whole


@dataclass(frozen=True)
class PackedCheckpoint:
    """A local checkpoint of packed linears, in AWQ's formats or as compressed-tensors.

    body: the folder of the transformer. layout: a name of `awq.config.FORMATS`, or
    "compressed-tensors". linears: name of a linear → kind of tensor → its header. first: the kind
    that every linear has. read: the weight of one linear, by name. headers: all tensors.
    """

    source: Source
    body: Path
    layout: str
    config: AwqConfig
    linears: PackedTensors
    first: str
    read: Callable[[str], QuantizedWeight]

    @classmethod
    def open(cls, directory: str | Path) -> PackedCheckpoint:
        """Raises ConfigError for other quantization methods, CheckpointError for what is broken or
        holds no packed weights."""
        opened = Source.open_directory(directory)
        body = body_directory(Path(directory))
        settings = compressed_tensors.settings_of(opened.config)
        if settings is not None:
            config = compressed_tensors.read_settings(settings, opened.headers)
            linears = compressed_tensors.linears_among(opened.headers)

            def read(name: str) -> QuantizedWeight:
                return compressed_tensors.read(name, linears[name], config)

            layout = COMPRESSED_TENSORS
            first = compressed_tensors.FIRST
        else:
            config = opened.settings
            linears = opened.packed

            def read(name: str) -> QuantizedWeight:
                return read_packed(name, linears[name], config)

            layout = config.format
            first = "qweight"

        if not linears:
            raise CheckpointError(f"{directory} holds no packed weights (no tensor named {first}).")
        return cls(opened, body, layout, config, linears, first, read)

    def dense(self) -> list[str]:
        """Modules that are not packed: those that the config names, and all other matrices."""
        matrices = compressed_tensors.dense_matrices(self.source.headers)
        return sorted(matrices | set(self.config.modules_to_not_convert))


def read_packed(
    name: str,
    entries: dict[str, dict[str, Any]],
    config: AwqConfig,
) -> QuantizedWeight:
    """The weight of one packed linear of a checkpoint; entries: its part of `Source.packed`.

    Raises CheckpointError when its tensors are missing, broken, or of other shapes than the config
    says.
    """
    check_complete(name, entries)
    parts = {}
    for kind in PACKED_TENSORS:
        with safe_open(entries[kind]["file"], "pt") as file:
            parts[kind] = file.get_tensor(f"{name}.{kind}")

    if parts["qweight"].dim() != 2:
        raise CheckpointError(
            f"{name}: qweight has shape {list(parts['qweight'].shape)}, not two axes."
        )

    packed_format = get_format(config.format)
    in_features, out_features = packed_format.features_of(parts["qweight"])
    size = config.group_size_of(in_features, name)
    shapes = packed_format.shapes(in_features, out_features, size)
    wrong = [kind for kind in PACKED_TENSORS if tuple(parts[kind].shape) != shapes[kind][0]]
    strange = [
        kind for kind in PACKED_TENSORS if not fits_dtype(entries[kind]["dtype"], shapes[kind][1])
    ]
    if strange:
        raise CheckpointError(
            f"{name}: {strange[0]} has dtype {entries[strange[0]]['dtype']}; the checkpoint is "
            "broken."
        )
    if not is_finite(parts["scales"]):
        raise CheckpointError(
            f"{name}: scales hold numbers that are not finite; download the checkpoint again."
        )
    if wrong:
        raise CheckpointError(
            f"{name}: {wrong[0]} has shape {list(parts[wrong[0]].shape)}, not "
            f"{list(shapes[wrong[0]][0])} as version "
            f"{config.format} with group_size {config.group_size} would have; correct "
            "quantization_config in config.json."
        )
    if config.format == "gemv_fast" and not zeros_are_whole(parts["scales"], parts["qzeros"]):
        raise CheckpointError(
            f"{name}: qzeros are no whole multiples of scales; download the checkpoint again."
        )
    try:
        return packed_format.unpack(parts, in_features, out_features, size)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
