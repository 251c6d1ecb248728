"""`AwqConfig`: the settings that decide how a quantized weight is stored, in the words of `config.json`.

AutoAWQ's spellings (`w_bit`, `q_group_size`, `version="GEMM"`) are understood here and in the compatibility layer, and
nowhere else. How the numbers are *found* (search, clip, rounding) is `awq.quantize.QuantizeOptions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from awq.errors import ConfigError

FORMATS = ("gemm", "gemv", "gemv_fast")
_FORMAT_ALIASES = {"gemvfast": "gemv_fast", "gemv-fast": "gemv_fast"}
_SPELLINGS = {"w_bit": "bits", "q_group_size": "group_size", "version": "format"}
# Keys that other writers put into a `quantization_config`; they carry nothing that the weights do not.
_IGNORED = {
    "quant_method", "backend", "checkpoint_format", "exllama_config", "do_fuse", "fuse_max_seq_len", "modules_to_fuse",
    "ipex_config", "desc_act", "sym", "lm_head", "meta", "pack_dtype", "dynamic", "true_sequential", "damp_percent",
    "model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id",
    "use_cuda_fp16", "max_input_length", "cache_block_outputs", "modules_in_block_to_quantize", "act_group_aware",
    "dataset", "tokenizer", "_load_in_4bit", "_load_in_8bit", "static_groups", "damp_auto_increment", "dequantize",
}  # fmt: skip


def normalize_format(name: str) -> str:
    """Canonical name of a packed format: "GEMM" → "gemm", "GEMVFast" → "gemv_fast".

    Raises ConfigError for a name that is not one of `FORMATS`.
    """
    lowered = str(getattr(name, "value", name)).lower()
    lowered = _FORMAT_ALIASES.get(lowered, lowered)
    if lowered not in FORMATS:
        raise ConfigError(f"version {name!r} is unknown; use one of {', '.join(FORMATS)} (AutoAWQ's spellings are understood).")
    return lowered


@dataclass(frozen=True)
class AwqConfig:
    """Storage settings of an AWQ checkpoint.

    bits: bits per weight; packed formats hold 4 (others only with `export_compatible=True`).
    group_size: input channels that share one scale and zero; −1 means the whole row.
    zero_point: True for asymmetric groups; False keeps every zero at the middle code (8 for 4 bits).
    format: "gemm", "gemv" or "gemv_fast".
    modules_to_not_convert: names (or parts of names) of linears that stay in full precision.
    """

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    format: str = "gemm"
    modules_to_not_convert: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", normalize_format(self.format))
        object.__setattr__(self, "modules_to_not_convert", tuple(self.modules_to_not_convert or ()))
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ConfigError(f"bits is {self.bits!r}; use an integer from 2 to 8 (packed checkpoints: 4).")
        size = self.group_size
        if not isinstance(size, int) or isinstance(size, bool) or (size != -1 and size < 8):
            raise ConfigError(f"group_size is {size!r}; use −1 (whole row) or an integer of at least 8, usually 32, 64 or 128.")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any] | None) -> AwqConfig:
        """From a `quant_config` of AutoAWQ's spelling, or the `quantization_config` of a checkpoint.

        Raises ConfigError on a key that means nothing, on conflicting spellings and on values that cannot work.
        """
        given: dict[str, Any] = {}
        for key, value in (settings or {}).items():
            name = _SPELLINGS.get(key, key)
            if name in _IGNORED:
                if name == "quant_method" and str(getattr(value, "value", value)) != "awq":
                    raise ConfigError(f"quant_method is {value!r}; this package reads 'awq' checkpoints.")
                continue
            if name not in cls.__dataclass_fields__:
                known = sorted({*cls.__dataclass_fields__, *_SPELLINGS})
                raise ConfigError(f"quant_config has an unknown key {key!r}; known keys are {', '.join(known)}.")
            if name == "format":
                value = normalize_format(value)
            if name in given and given[name] != value:
                raise ConfigError(f"quant_config gives {name} twice with different values: {given[name]!r} and {value!r}.")
            given[name] = value
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """AutoAWQ's spelling: `zero_point, q_group_size, w_bit, version, modules_to_not_convert`."""
        return {
            "zero_point": self.zero_point,
            "q_group_size": self.group_size,
            "w_bit": self.bits,
            "version": self.format,
            "modules_to_not_convert": list(self.modules_to_not_convert) or None,
        }

    def to_transformers_dict(self) -> dict[str, Any]:
        """What stands under `quantization_config` in `config.json`."""
        return {
            "quant_method": "awq",
            "bits": self.bits,
            "group_size": self.group_size,
            # A reader that sees `zero_point: false` leaves its fast path; constant zeros say the same thing.
            "zero_point": True,
            "version": self.format,
            "modules_to_not_convert": list(self.modules_to_not_convert) or None,
        }

    def with_(self, **changes: Any) -> AwqConfig:
        return replace(self, **changes)

    def group_size_of(self, in_features: int, name: str = "linear") -> int:
        """The number of input channels per group for one linear.

        Raises ConfigError when `group_size` does not divide `in_features`.
        """
        size = in_features if self.group_size == -1 else self.group_size
        if in_features % size:
            fitting = [g for g in (128, 64, 32, 16) if in_features % g == 0 and g < size]
            hint = f"use group_size {' or '.join(map(str, fitting))}" if fitting else "use group_size −1"
            raise ConfigError(
                f"{name}: in_features {in_features} is not a multiple of group_size {size}; {hint}, "
                "or skip this layer with modules_to_not_convert."
            )
        return size
