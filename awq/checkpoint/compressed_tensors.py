"""Packed linears as compressed-tensors stores them: the files of llm-compressor.

Four tensors stand for one linear's `weight`:

weight_packed int32 [out, ceil(in / 8)], eight codes a word in natural order along the inputs;
weight_scale float [out, groups];
weight_zero_point int32 [ceil(out / 8), groups], eight zeros a word along the outputs; absent where
    every zero is 8;
weight_shape int64 [2] = (out, in).

Codes are kept as 0 … 15, as AWQ's are, so that nothing is rounded on the way.
Source: https://github.com/vllm-project/compressed-tensors, format "pack-quantized".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from awq.checkpoint.account import is_finite
from awq.checkpoint.files import FLOATS, PackedTensors
from awq.config import COMPRESSED_TENSORS, AwqConfig
from awq.core.weight import QuantizedWeight
from awq.errors import CheckpointError, ConfigError
from awq.formats.base import pack_words, unpack_words

FIRST = "weight_packed"
_KINDS = (FIRST, "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_NEEDED = (FIRST, "weight_scale", "weight_shape")
_DTYPES = {
    FIRST: ("I32",),
    "weight_scale": FLOATS,
    "weight_zero_point": ("I32",),
    "weight_shape": ("I64", "I32"),
}
_MIDDLE = 8  # the zero of a symmetric group, as a code

Linear = dict[str, dict[str, Any]]
"""Kind of tensor → its header."""


def write_settings(config: AwqConfig, dense: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. dense: names of the modules that are not packed."""
    whole_row = config.group_size == -1
    weights = {
        "num_bits": config.bits,
        "type": "int",
        "symmetric": False,
        "strategy": "channel" if whole_row else "group",
        "group_size": None if whole_row else config.group_size,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}

    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": dense,
    }


def pack(name: str, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The four tensors of the linear `name`.

    dtype: of the model. Readers compute weights in the dtype of the scales, so those of a float32
    model are float32; bfloat16 would round them, so all others keep float16.
    """
    out_features, in_features = weight.codes.shape
    dtype_of_scales = torch.float32 if dtype == torch.float32 else torch.float16
    tensors = {
        "weight_packed": pack_words(_filled(weight.codes)),
        "weight_scale": weight.scales.to(dtype_of_scales),
        "weight_zero_point": pack_words(_filled(weight.zeros.t())).t(),
        "weight_shape": torch.tensor([out_features, in_features]),
    }

    return {f"{name}.{kind}": tensor.contiguous() for kind, tensor in tensors.items()}


def _filled(values: Tensor) -> Tensor:
    """Zeros behind the last axis, up to a multiple of eight."""
    return F.pad(values, (0, -values.shape[-1] % 8))


def settings_of(config: Any) -> dict[str, Any] | None:
    """The quantization settings in transformers' config when they are compressed-tensors', or
    None."""
    given = getattr(config, "quantization_config", None)
    if given is not None and not isinstance(given, dict):
        given = given.to_dict() if hasattr(given, "to_dict") else None
    if given and str(given.get("quant_method")) == COMPRESSED_TENSORS:
        return given
    return None


def read_settings(settings: Mapping[str, Any], headers: Mapping[str, Any]) -> AwqConfig:
    """What AWQ's config says of such files; headers: of all tensors.

    Raises ConfigError unless all that is quantized are weights of 4 bits in groups of one size.
    """
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ConfigError("quantization_config has no config_groups; nothing says how to read it.")

    sizes = {_group_size(name, group) for name, group in groups.items()}
    if len(sizes) > 1:
        raise ConfigError(
            f"config_groups have the group sizes {sorted(sizes)}; AWQ's files have one."
        )

    ignored = settings.get("ignore") or []
    if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
        raise ConfigError(f"ignore is {ignored!r:.100}; it must be a list of names of modules.")

    for name in ("sparsity_config", "transform_config"):
        given = settings.get(name) or {}
        plain = isinstance(given, dict) and given.get("format", "dense") == "dense"
        if not plain or given.get("config_groups"):
            raise ConfigError(
                f"{name} is {given!r:.100}; AWQ's files hold neither sparse nor turned weights."
            )

    named = [name for name in ignored if not name.startswith("re:")]
    dense = sorted({*named, *dense_matrices(headers)})

    return AwqConfig(group_size=sizes.pop(), modules_to_not_convert=tuple(dense))


def dense_matrices(headers: Mapping[str, Any]) -> set[str]:
    """Modules whose `weight` has two axes and is not packed. Linears among them must be named to a
    reader that would take all linears for packed ones."""
    return {
        name.removesuffix(".weight")
        for name, entry in headers.items()
        if name.endswith(".weight") and len(entry["shape"]) == 2
    }


def _group_size(name: str, group: Any) -> int:
    """Of one of the config_groups; −1 for the whole row."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise ConfigError(f"config_groups: {name} does not say how weights are stored.")

    activations = [group.get(f"{side}_activations") for side in ("input", "output")]
    if any(given is not None for given in activations):
        raise ConfigError(f"config_groups: {name} quantizes activations; AWQ's files cannot.")
    if weights.get("num_bits") != 4 or weights.get("type") != "int":
        raise ConfigError(
            f"config_groups: {name} has {weights.get('num_bits')} bits of type "
            f"{weights.get('type')!r}; AWQ's files hold integers of 4 bits."
        )

    strategy = weights.get("strategy")
    if strategy == "channel":
        return -1

    size = weights.get("group_size")
    if strategy not in (None, "group") or not isinstance(size, int):
        raise ConfigError(
            f"config_groups: {name} has the strategy {strategy!r} and group_size {size!r}; "
            "use groups of inputs or whole rows."
        )
    return size


def linears_among(headers: Mapping[str, dict[str, Any]]) -> PackedTensors:
    """The packed linears among the headers of a checkpoint's tensors."""
    found: PackedTensors = {}
    for name, entry in headers.items():
        module, _, kind = name.rpartition(".")
        if kind in _KINDS:
            found.setdefault(module, {})[kind] = entry
    return found


def read(name: str, entries: Linear, config: AwqConfig) -> QuantizedWeight:
    """The weight of one linear.

    Raises CheckpointError for tensors that are missing, broken or do not fit each other, and
    ConfigError for an order of inputs of its own, which AWQ's files cannot hold.
    """
    missing = [kind for kind in _NEEDED if kind not in entries]
    if missing:
        raise CheckpointError(
            f"{name}: the checkpoint lacks {', '.join(missing)}; download it again."
        )
    if "weight_g_idx" in entries:
        raise ConfigError(
            f"{name} has groups of inputs in an order of their own (weight_g_idx), which AWQ's "
            "files cannot hold."
        )

    for kind, entry in entries.items():
        if entry["dtype"] not in _DTYPES[kind]:
            raise CheckpointError(
                f"{name}: {kind} has dtype {entry['dtype']}; the checkpoint is broken."
            )

    parts = {kind: _tensor(f"{name}.{kind}", entry) for kind, entry in entries.items()}
    out_features, in_features = _shape(name, parts["weight_shape"])
    groups = in_features // config.group_size_of(in_features, name)
    expected = {
        FIRST: (out_features, -(-in_features // 8)),
        "weight_scale": (out_features, groups),
        "weight_zero_point": (-(-out_features // 8), groups),
    }

    for kind, shape in expected.items():
        if kind in parts and tuple(parts[kind].shape) != shape:
            raise CheckpointError(
                f"{name}: {kind} has shape {list(parts[kind].shape)}, not {list(shape)}; the "
                "checkpoint is broken."
            )

    codes = unpack_words(parts[FIRST])[:, :in_features].contiguous()
    zeros = torch.full((out_features, groups), _MIDDLE, dtype=torch.uint8)
    if "weight_zero_point" in parts:
        words = parts["weight_zero_point"].t().contiguous()
        zeros = unpack_words(words)[:, :out_features].t().contiguous()

    return QuantizedWeight(codes, _storable(name, parts["weight_scale"]), zeros)


def _tensor(name: str, entry: Mapping[str, Any]) -> Tensor:
    with safe_open(entry["file"], "pt") as file:
        return file.get_tensor(name)


def _shape(name: str, stored: Tensor) -> tuple[int, int]:
    sizes = stored.flatten().tolist()
    if len(sizes) != 2 or min(sizes) < 1:
        raise CheckpointError(f"{name}: weight_shape is {sizes}, not two sizes of a matrix.")
    return sizes[0], sizes[1]


def _storable(name: str, scales: Tensor) -> Tensor:
    """Scales in float16, as AWQ's files hold them. Scales of bfloat16 keep all of their digits."""
    halves = scales.half()
    if not is_finite(scales) or not is_finite(halves) or bool((halves == 0).ne(scales == 0).any()):
        raise CheckpointError(
            f"{name}: weight_scale holds numbers that float16 does not; AWQ's files cannot hold it."
        )
    return halves
