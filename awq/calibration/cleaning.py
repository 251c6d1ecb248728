"""Texts as they come from files and databases, made fit for calibration."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from awq.errors import CalibrationError

# Control and unassigned characters, lone surrogates. Joiners and other format characters (Cf)
# belong to scripts and emoji.
_STRAY = {"Cc", "Cs", "Cn"}
# zero-width space, byte order mark, word joiner, soft hyphen
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\ufeff\u2060\u00ad"))


def clean_texts(texts: Iterable[str | None]) -> list[str]:
    """Texts without control characters, with single spaces for any run of white space, without
    empty ones and duplicates.

    The first of equal texts stays, in the order given. Raises CalibrationError for a single string
    or other kinds.
    """
    if isinstance(texts, str):
        raise CalibrationError("texts is one string; give a list of strings.")

    cleaned: dict[str, None] = {}
    for text in texts:
        if text is None:
            continue
        if not isinstance(text, str):
            raise CalibrationError(f"texts hold a {type(text).__name__}; give strings.")

        spaced = re.sub(r"\s+", " ", text.translate(_INVISIBLE))
        kept = "".join(c for c in spaced if unicodedata.category(c) not in _STRAY).strip()
        if kept:
            cleaned[kept] = None

    return list(cleaned)


def repaired(text: str) -> str:
    """The text without lone surrogates, which no tokenizer takes."""
    if text.isascii():
        return str(text)
    return "".join(c for c in text if not 0xD800 <= ord(c) <= 0xDFFF)
