"""`AwqConfig`: the settings that decide how a quantized weight is stored, in the words of
`config.json`.

AutoAWQ's spellings (`w_bit`, `q_group_size`, `version="GEMM"`) are understood here and in the
compatibility layer, and nowhere else. How the numbers are *found* (search, clip, rounding) is
`awq.quantize.QuantizeOptions`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from awq.errors import ConfigError

logger = logging.getLogger("awq")

METHOD = "awq"  # as `config.json` names it
# transformers looks a method up as it is spelled, and loads random numbers for one it does not know
METHODS = (METHOD, METHOD.upper(), METHOD.title())
# On-disk format → dtypes of its tensors. Here and not beside the codecs, because `awq info` judges
# headers without importing torch.
FORMATS: dict[str, tuple[str, ...]] = {
    "gemm": ("int32", "float16"),
    "gemv": ("int32", "float16"),
    "gemv_fast": ("int16", "float16"),
}
# Layouts that `awq convert` knows beside them: llm-compressor's files, and ordinary weights.
COMPRESSED_TENSORS, DENSE = "compressed-tensors", "dense"
# The tensors of a packed linear, in every format and layout.
PACKED_TENSORS = ("qweight", "qzeros", "scales")
_FORMAT_ALIASES = {"gemvfast": "gemv_fast", "gemv-fast": "gemv_fast"}
# Names of kernels that older writers put where the layout's name belongs; all of them read the gemm
# layout.
_GEMM_KERNELS = {"exllama", "ipex", "exllama_v1", "exllama_v2", "gemm_triton"}
_USUAL_GROUP_SIZES = (128, 64, 32, 16)
_SPELLINGS = {"w_bit": "bits", "q_group_size": "group_size", "version": "format"}


def fitting_group_sizes(widths: Iterable[int]) -> list[int]:
    """The usual group sizes that divide all these numbers of inputs, largest first.

    >>> fitting_group_sizes([576, 1536])
    [64, 32, 16]
    """
    widths = list(widths)
    return [size for size in _USUAL_GROUP_SIZES if not any(width % size for width in widths)]


def stored_dtypes() -> set[str]:
    """Of the tensors that files of some format hold, as torch names them."""
    return {dtype for dtypes in FORMATS.values() for dtype in dtypes}


def normalize_format(name: str) -> str:
    """Canonical name of a packed format: "GEMM" → "gemm", "GEMVFast" → "gemv_fast".

    Raises ConfigError for a name that is not one of `FORMATS`.
    """
    lowered = str(getattr(name, "value", name)).lower()
    lowered = _FORMAT_ALIASES.get(lowered, lowered)
    if lowered not in FORMATS:
        raise ConfigError(
            f"version {name!r} is unknown; use one of {', '.join(FORMATS)} (AutoAWQ's spellings "
            "are understood)."
        )
    return lowered


def _names(given: Any) -> tuple[str, ...]:
    """Names of modules; one string is one name. Raises ConfigError for anything else."""
    names = (given,) if isinstance(given, str) else given or ()
    is_list = isinstance(names, (list, tuple, set, frozenset))
    if not is_list or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"modules_to_not_convert is {given!r}; use a list of names of modules.")

    if isinstance(names, (set, frozenset)):
        return tuple(sorted(names))
    return tuple(names)


def quant_method(stored: Any) -> str:
    """The `quant_method` of what stands under `quantization_config` in a `config.json`, or of
    transformers' object for it, in lower case: tools spell it as they like."""
    get = stored.get if isinstance(stored, Mapping) else lambda name: getattr(stored, name, None)
    method = get("quant_method")
    return str(getattr(method, "value", method)).lower()


@dataclass(frozen=True)
class AwqConfig:
    """Storage settings of an AWQ checkpoint.

    bits: bits per weight: 4, because AWQ's formats hold nothing else.
    group_size: input channels that share one scale and zero; −1 means the whole row.
    zero_point: True for asymmetric groups; False keeps every zero at the middle code (8 for 4
    bits).
    format: "gemm", "gemv" or "gemv_fast".
    modules_to_not_convert: names of modules whose linears stay in full precision, or parts of names
    between dots.
    """

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    format: str = "gemm"
    modules_to_not_convert: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", normalize_format(self.format))
        object.__setattr__(self, "modules_to_not_convert", _names(self.modules_to_not_convert))
        if not isinstance(self.zero_point, bool):
            raise ConfigError(f"zero_point is {self.zero_point!r}; use True or False.")
        if isinstance(self.bits, bool) or self.bits != 4:
            raise ConfigError(f"bits is {self.bits!r}; AWQ's formats hold 4 bits: use 4 (w_bit 4).")

        size = self.group_size
        if not isinstance(size, int) or isinstance(size, bool) or (size != -1 and size < 8):
            raise ConfigError(
                f"group_size is {size!r}; use −1 (whole row) or an integer of at least 8, usually "
                "32, 64 or 128."
            )

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any] | None) -> AwqConfig:
        """From a user's own `quant_config`, in AutoAWQ's spelling or ours; strict, since a key that
        means nothing is a typo.

        Raises ConfigError on such a key, on conflicting spellings and on values that cannot work.

        >>> AwqConfig.from_dict({"w_bit": 4, "q_group_size": 64, "version": "GEMM"}).group_size
        64
        """
        known = {*cls.__dataclass_fields__, *_SPELLINGS, "quant_method"}
        unknown = [key for key in settings or {} if key not in known]
        if unknown:
            names = ", ".join(sorted(known - {"quant_method"}))
            raise ConfigError(
                f"quant_config has an unknown key {unknown[0]!r}; known keys are {names}."
            )
        return cls._from_known(settings or {})

    @classmethod
    def from_file(cls, settings: Mapping[str, Any]) -> AwqConfig:
        """From the `quantization_config` that some tool wrote into a checkpoint.

        Tolerant: every tool adds keys of its own, and the tensors decide in the end. Keys that mean
        nothing here are logged. Raises ConfigError for another `quant_method` and for values that
        cannot work.
        """
        known = {*cls.__dataclass_fields__, *_SPELLINGS, "quant_method"}
        foreign = sorted(str(key) for key in settings if key not in known)
        if foreign:
            logger.info(
                "quantization_config: keys of other tools, without effect here: %s",
                ", ".join(foreign),
            )

        given = {
            key: value for key, value in settings.items() if key in known and value is not None
        }
        version = given.get("version")
        if str(getattr(version, "value", version)).lower() in _GEMM_KERNELS:
            given["version"] = "gemm"
        if "version" in given and given.get("format") not in FORMATS:
            # GPTQModel says "gemm" there too, others what the file's container is
            given.pop("format", None)

        return cls._from_known(given)

    @classmethod
    def _from_known(cls, settings: Mapping[str, Any]) -> AwqConfig:
        if "quant_method" in settings and quant_method(settings) != METHOD:
            raise ConfigError(
                f"quant_method is {settings['quant_method']!r}; this package reads 'awq' "
                "checkpoints. `awq convert` turns those of compressed-tensors into them."
            )

        given: dict[str, Any] = {}
        for key, value in settings.items():
            name = _SPELLINGS.get(key, key)
            if name == "quant_method":
                continue

            if name == "format":
                value = normalize_format(value)
            if name in given and given[name] != value:
                raise ConfigError(
                    f"quant_config gives {name} twice with different values: {given[name]!r} and "
                    f"{value!r}."
                )
            given[name] = value

        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """AutoAWQ's spelling: `zero_point, q_group_size, w_bit, version,
        modules_to_not_convert`."""
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
            "quant_method": METHOD,
            "bits": self.bits,
            "group_size": self.group_size,
            # A reader that sees `zero_point: false` leaves its fast path; constant zeros say the
            # same thing.
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
            fitting = fitting_group_sizes([in_features])
            if fitting:
                hint = f"use group_size {' or '.join(map(str, fitting))}"
            else:
                hint = "use group_size −1"

            raise ConfigError(
                f"{name}: in_features {in_features} is not a multiple of group_size {size}; "
                f"{hint}, "
                "or skip this layer with modules_to_not_convert."
            )
        return size
