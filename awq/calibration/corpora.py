"""Prose in the form in which the field's corpora keep it: split into words, rare ones hidden.

Language models are most often judged on such text (Penn Treebank, WikiText, translation corpora), and no other text stands in
for it: calibrated without it, the products of its marks and of `<unk>` are among the worst (docs/notes/quality.md).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence

_INSIDE = re.compile(r"(?<=\w)-(?=\w)|(?<=\d)[.,](?=\d)")  # marks inside a word or number, which those corpora write as @-@
_PIECE = re.compile(r"@[-.,]@|['’](?:s|t|d|m|re|ve|ll)\b|\w+|[^\w\s]|\n")
_SHORTEST, _MOST_LINES, _LETTERS = 400, 3, 0.7  # of a passage that counts as prose: characters, lines, share of Latin letters


def split_words(text: str, known: Collection[str]) -> str:
    """`The well-known 1.5 m "rule".` → `The well @-@ known 1 @.@ 5 m " rule " .`, words that are not in `known` as `<unk>`."""
    pieces = _PIECE.findall(_INSIDE.sub(lambda mark: f" @{mark[0]}@ ", text))
    return " ".join("<unk>" if piece.isalpha() and piece not in known else piece for piece in pieces)


def with_corpus_form(passages: Sequence[str]) -> list[str]:
    """The passages, every second one of prose split into words; those that occur once in all of them are hidden."""
    counts = Counter(word for passage in passages for word in re.findall(r"\w+", passage))
    known = {word for word, count in counts.items() if count > 1}
    found, prose = [], 0
    for passage in passages:
        prose += _is_prose(passage)
        found.append(split_words(passage, known) if _is_prose(passage) and prose % 2 == 0 else passage)
    return found


def _is_prose(passage: str) -> bool:
    letters = sum(c.isalpha() and c.isascii() for c in passage)
    return len(passage) >= _SHORTEST and passage.count("\n") < _MOST_LINES and letters >= _LETTERS * len(passage)
