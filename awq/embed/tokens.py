"""Token ids without transformers' Python, where the tokenizers library gives the same ones, and ids
that the model does not know."""

from __future__ import annotations

from typing import Any

from awq.errors import ConfigError
from awq.native.tokens import TextTokens
from awq.nn.locks import lock_of

TRIED = (
    "The river is cold.",
    "",
    " two  spaces, a\ttab and\na line ",
    "Ünïcödé, 漢字 and 🙂, \u200b\u0001",
    "[CLS] [SEP] [MASK] <s> </s> <mask> <|im_end|> <eos>",
    "words-of-no-vocabulary \ue000",
)


class QuickTokens:
    """Rows by input name, as a tokenizer of transformers gives them. definition: its
    `tokenizer.json`."""

    def __init__(self, definition: str, longest: int, side: str, has_types: bool) -> None:
        self.definition = definition
        self.side = side
        self.has_types = has_types
        self._longest = longest
        self._tokens = TextTokens(definition, longest, side)

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        ids, types = self._tokens(texts)
        return {"input_ids": ids} | ({"token_type_ids": types} if self.has_types else {})

    def __getstate__(self) -> tuple[Any, ...]:
        return self.definition, self._longest, self.side, self.has_types

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]


def quick_tokens(tokenizer: Any, longest: int) -> QuickTokens | None:
    """None for tokenizers in Python, and where texts that are hard to cut come out differently."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None

    with lock_of(tokenizer):
        texts = [*TRIED, TRIED[0] * longest]
        found = tokenizer(texts, truncation=True, max_length=longest)
        definition = backend.to_str()

    side = getattr(tokenizer, "truncation_side", "right")
    quick = QuickTokens(definition, longest, side, "token_type_ids" in found)
    try:
        same = all(found[name] == rows for name, rows in quick(texts).items())
    except Exception:  # of the library's machine code, where a vocabulary contradicts itself
        return None

    return quick if same else None


def known_ids(model: Any, tokenizer: Any) -> int | None:
    """Rows of the embedding table where the tokenizer has larger ids; None, as nearly always, where
    it has none."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=0)
    return rows if largest >= rows else None


def padding_id(model: Any, tokenizer: Any) -> int:
    """What fills short rows: any id of the table would do, since masks hide it. A tokenizer may
    have a token for it that the table lacks, or none."""
    rows = model.get_input_embeddings().weight.shape[0]
    own = tokenizer.pad_token_id
    return own if own is not None and 0 <= own < rows else 0


def check_ids(rows: list[list[int]], known: int) -> None:
    """An id beyond the table would read other memory, or end a GPU's process. Raises
    ConfigError."""
    largest = max((max(ids, default=0) for ids in rows), default=0)
    if largest >= known:
        raise ConfigError(
            f"the tokenizer gives the id {largest}, and the model knows 0 to {known - 1}; is it "
            "another model's tokenizer?"
        )
