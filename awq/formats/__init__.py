"""Codecs between the canonical weight and the layouts on disk: pure functions, exactly invertible, vectorized."""

from __future__ import annotations

from awq.config import normalize_format
from awq.formats.base import Format
from awq.formats.gemm import GEMM
from awq.formats.gemv import GEMV
from awq.formats.gemv_fast import GEMV_FAST

_FORMATS: dict[str, Format] = {f.name: f for f in (GEMM, GEMV, GEMV_FAST)}


def get_format(name: str) -> Format:
    """The codec of a version, in any spelling ("GEMM", "gemv_fast", "GEMVFast"). Raises ConfigError when unknown."""
    return _FORMATS[normalize_format(name)]


__all__ = ["Format", "get_format"]
