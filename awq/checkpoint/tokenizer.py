"""The tokenizer beside a model, told apart from the empty one that transformers makes up when its
files are missing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer

from awq.calibration.samples import tokenizer_of
from awq.checkpoint.modules import body_directory
from awq.errors import ModelError, first_line
from awq.nn.locks import lock_of

logger = logging.getLogger("awq.checkpoint")

MAX_IDS_A_TOKEN, MAX_IDS_BESIDE = 4, 1 << 20
UNKNOWN = "a \ue000 word"  # with a character of no language


def load_tokenizer(path: str | Path, trust_remote_code: bool = False, **download: Any) -> Any:
    """The tokenizer of a local directory or hub id. Raises ModelError when there is none with a
    vocabulary."""
    place = body_directory(Path(path)) if Path(path).is_dir() else path
    _check_ids(Path(place) / "tokenizer.json")
    with _told_as(f"{path} has no tokenizer that transformers can load"):
        tokenizer = AutoTokenizer.from_pretrained(
            place, trust_remote_code=trust_remote_code, **download
        )

    if not _spells_anything(tokenizer):
        # transformers 5 makes one up from the model type when the files are missing: every word
        # would be unknown.
        raise ModelError(
            f"{path} has no tokenizer files (a vocabulary is missing); copy them from the "
            "original model."
        )

    _check_use(tokenizer, path)
    return tokenizer


def _spells_anything(tokenizer: Any) -> bool:
    """Whether a token beside the special ones has a letter or a digit. T5's made-up vocabulary has
    a mark for a space, too."""
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    return any(character.isalnum() for word in words for character in word)


def _check_ids(definition: Path) -> None:
    """Refuses a vocabulary whose largest id is far beyond its size: readers make tables of that
    length. What cannot be read here is the reader's to refuse."""
    try:
        found = json.loads(definition.read_bytes()) if definition.is_file() else {}
        tokens = {token["content"]: token["id"] for token in found.get("added_tokens") or ()}
        tokens |= found["model"]["vocab"]
        largest = max(tokens.values())
        if not largest > MAX_IDS_A_TOKEN * len(tokens) + MAX_IDS_BESIDE:
            return
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return
    raise ModelError(
        f"{definition} numbers {len(tokens)} tokens up to {largest}; the file is broken."
    )


def _check_use(tokenizer: Any, path: str | Path) -> None:
    """Refuses a tokenizer that would fail at some text later: settings are taken as they stand in
    its file."""
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, (int, float)) or not longest > 0:
        raise ModelError(
            f"{path} has a tokenizer whose model_max_length is {longest!r}; it must be a positive "
            "number of tokens."
        )
    with _told_as(f"{path} has a tokenizer that cannot read text"), lock_of(tokenizer):
        tokenizer(UNKNOWN)


@contextmanager
def _told_as(words: str) -> Iterator[None]:
    """Any failure of a tokenizer as a ModelError: they fail in as many ways as there are kinds of
    them. A panic of machine code in Rust is no `Exception`, but no wish to stop either."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{words}: {first_line(error)}") from error


def find_tokenizer(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The same, or None with a log line where `load_tokenizer` raises."""
    try:
        return load_tokenizer(path, trust_remote_code)
    except ModelError as error:
        logger.info("%s", error)
        return None


def find_processor(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The processor of a model that takes images or sound, or None."""
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # in as many ways as tokenizers
        logger.info("%s has no processor: %s", path, first_line(error))
        return None
    return None if tokenizer_of(processor) is processor else processor
