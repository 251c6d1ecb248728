"""Arguments of `quantize` that are refused before any work, with what to say instead."""

from __future__ import annotations

from typing import Any

from awq.errors import ConfigError
from awq.quantize import QuantizeOptions
from awq.quantize.quantizer import AwqQuantizer


def check_streamed(options: QuantizeOptions, export_compatible: bool) -> None:
    """Refuses what needs the whole model in memory."""
    if options.tuning:
        raise ConfigError(
            "tuning (preset 'best') needs the whole model in memory, and it is streamed; use "
            "preset 'balanced', or quantize it in memory."
        )
    if export_compatible:
        raise ConfigError(
            "export_compatible keeps the whole model in memory, and it is streamed; use packed "
            "weights, or quantize it in memory."
        )


def check_quantizer(quantizer_cls: Any) -> None:
    """Refuses a quantizer of the caller's own, whose methods would never be called."""
    if quantizer_cls not in (None, AwqQuantizer):
        name = getattr(quantizer_cls, "__name__", repr(quantizer_cls))
        raise ConfigError(
            f"quantizer_cls is {name}, whose methods nothing would call here; leave it out, and "
            "give inputs of a processor as calib_data."
        )


# How AutoAWQ called some of it in one release or another → how it is said here.
_SAID_NOW = {
    "auto_scale": "scaling",
    "gguf_compatible": "export_compatible",
    "modules_to_not_convert": 'quant_config={"modules_to_not_convert": [...]}',
    "mse_range": "apply_clip",
    "n_samples": "max_calib_samples",
    "seqlen": "max_calib_seq_len",
}


def quantize_options(given: dict[str, Any]) -> QuantizeOptions:
    """The fields of `QuantizeOptions` that a caller gave by name. Raises ConfigError for others."""
    fields = QuantizeOptions.__dataclass_fields__
    unknown = sorted(set(given) - set(fields))
    for name in unknown:
        if name in _SAID_NOW:
            raise ConfigError(f"quantize() does not know {name}; say {_SAID_NOW[name]} instead.")

    if unknown:
        known = ", ".join(fields)
        names = ", ".join(unknown)
        raise ConfigError(f"quantize() does not know {names}; further options are {known}.")
    return QuantizeOptions(**given)
