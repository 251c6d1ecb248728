"""Codecs between the canonical weight and packed layouts: pure functions, exactly invertible,
vectorized."""

from __future__ import annotations

from awq.config import normalize_format
from awq.formats.base import Format
from awq.formats.gemm import GEMM
from awq.formats.gemv import GEMV
from awq.formats.gemv_fast import GEMV_FAST
from awq.formats.int4pack import INT4PACK
from awq.formats.planar import PLANAR
from awq.formats.rows16 import ROWS16

_FORMATS: dict[str, Format] = {f.name: f for f in (GEMM, GEMV, GEMV_FAST)}
# Layouts that backends compute on: they live in memory only and no checkpoint names them.
_LAYOUTS: dict[str, Format] = _FORMATS | {f.name: f for f in (PLANAR, ROWS16, INT4PACK)}


def get_format(name: str) -> Format:
    """The codec of a version, in any spelling ("GEMM", "gemv_fast", "GEMVFast").

    Raises ConfigError when unknown.

    >>> get_format("GEMVFast").shapes(256, 64, 128)["qweight"]  # in, out, group size
    ((16, 256), torch.int16)
    """
    return _FORMATS[normalize_format(name)]


def get_layout(name: str) -> Format:
    """The codec of an on-disk format or of an in-memory layout ("planar"). Raises ConfigError when
    unknown."""
    return _LAYOUTS.get(name) or get_format(name)


__all__ = ["Format", "get_format", "get_layout"]
