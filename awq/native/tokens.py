"""Texts to token ids, by the tokenizers library alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Rows = list[list[int]]


class TextTokens:
    """Token ids as transformers' tokenizer of the same `tokenizer.json` gives them.

    definition: that file's text. longest: tokens of a text, special ones included; what is longer
    is cut on `side`. An object of its own is called from many threads without a lock, since nobody
    changes its settings.
    """

    def __init__(self, definition: str, longest: int, side: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_str(definition)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(longest, direction=side)

    def __call__(self, texts: Sequence[str]) -> tuple[Rows, Rows]:
        """(token ids, token types), one row per text, without padding."""
        if len(texts) == 1:
            found = [self._tokenizer.encode(texts[0])]
        else:
            found = self._tokenizer.encode_batch_fast(list(texts))
        return [one.ids for one in found], [one.type_ids for one in found]
