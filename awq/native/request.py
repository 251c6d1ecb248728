"""What `encode` is asked, checked once before anything is tokenized."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from awq.errors import ConfigError


def checked_texts(texts: Any) -> list[str]:
    """A list of strings that a tokenizer takes. Raises ConfigError for anything else, and for no
    text at all."""
    if isinstance(texts, (bytes, dict)) or not isinstance(texts, Iterable):
        raise ConfigError(f"texts are {type(texts).__name__}; give a string or a list of strings.")

    listed = list(texts)
    strange = sorted({type(text).__name__ for text in listed if not isinstance(text, str)})
    if strange:
        raise ConfigError(f"texts hold a {strange[0]}; give strings.")
    if not listed:
        raise ConfigError("no texts to embed; give at least one.")
    return [repaired(text) for text in listed]


def check_arguments(truncate_dim: Any, prompt: Any, batch_size: Any = 1) -> None:
    """Raises ConfigError for a batch size, a number of features or a prompt that cannot be
    meant."""
    for name, value in (("batch_size", batch_size), ("truncate_dim", truncate_dim)):
        if value is None and name == "truncate_dim":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} is {value!r:.100}; it must be a whole number of at least 1.")
    if prompt is not None and not isinstance(prompt, str):
        raise ConfigError(
            f"prompt is {type(prompt).__name__}; give the text itself, or prompt_name."
        )


def repaired(text: str) -> str:
    """The text without lone surrogates, which no tokenizer takes."""
    if text.isascii():
        return text
    return "".join(character for character in text if not 0xD800 <= ord(character) <= 0xDFFF)
