"""Figures of one saved model, beside those of its full-precision original when that is given.

Language models are judged by perplexity, and beside their original by KL divergence and flips
(`evals.divergence`). Embedding models are judged by the drift of their embeddings and by rank
correlation on scored sentence pairs (`evals.similarity`). Texts of files become one long text for
the first kind, and separate ones for the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from awq.calibration.sources import file_texts
from awq.checkpoint.load import load_model, model_class
from awq.checkpoint.source import Source
from awq.checkpoint.tokenizer import load_tokenizer
from awq.embed.encoder import Encoder
from awq.errors import CalibrationError, ConfigError
from awq.evals.divergence import Divergence, divergence, perplexity_interval
from awq.evals.perplexity import exp_of, token_losses
from awq.evals.similarity import EmbeddingDrift, embeddings_of, judge, pair_spearman, read_pairs
from awq.nn.surgery import usable_device

MIN_TEXTS = 2


@dataclass(frozen=True)
class TextFigures:
    """Perplexity of a language model on a text, with its 95 % interval (block bootstrap). loss:
    mean nats a token."""

    tokens: int
    loss: float
    perplexity: float
    interval: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        """One line for a terminal."""
        low, high = self.interval
        return f"perplexity {self.perplexity:.3f} ({low:.3f}–{high:.3f}) on {self.tokens} tokens"


@dataclass(frozen=True)
class PairFigures:
    """Spearman correlation × 100 of an embedding model's cosines with people's scores of sentence
    pairs."""

    pairs: int
    spearman: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        """One line for a terminal."""
        return f"sentence pairs, Spearman ×100: {self.spearman:.2f} on {self.pairs} pairs"


def is_language_model(model: str | Path) -> bool:
    """Whether a directory or hub id continues texts, with towers for images or without; other
    models are judged by their embeddings."""
    return _text_class(Source.open(model)) is not None


def _text_class(source: Source) -> Any:
    """The class whose logits continue a text, or None for a model that has none."""
    kind = model_class(source)
    if kind is AutoModelForCausalLM or kind.__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return AutoModelForCausalLM
    if kind is AutoModelForImageTextToText:
        return kind

    generates = getattr(kind, "can_generate", None)
    two_stacks = bool(getattr(source.config, "is_encoder_decoder", False))

    return kind if generates is not None and generates() and not two_stacks else None


def token_ids(model: str | Path, text: str | Path, column: str = "text") -> Tensor:
    """int64 [tokens] of a file's text, read as one, by the tokenizer of `model`, without special
    tokens.

    Raises CalibrationError when the file cannot be read, ModelError when the model has no
    tokenizer.
    """
    path = Path(text)
    if not path.is_file():
        raise CalibrationError(f"text file {path} does not exist.")

    if path.suffix.lower() in (".txt", ".md"):
        try:
            whole = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeError) as error:
            raise CalibrationError(f"{path} cannot be read as UTF-8 text: {error}.") from error
    else:
        whole = "\n\n".join(file_texts(path, column))

    tokenizer = load_tokenizer(str(model))
    return torch.tensor(
        tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64
    )


def _for_texts(model: str | Path, dtype: torch.dtype | str) -> Any:
    source = Source.open(model)
    return load_model(source, dtype, kind=_text_class(source) or AutoModelForCausalLM)


def evaluate_text(
    model: str | Path,
    input_ids: Tensor,
    base: str | Path | None = None,
    window: int = 1024,
    limit: int | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
) -> TextFigures | Divergence:
    """A language model's figures on int64 [tokens], beside those of `base` when it is given.

    window: tokens that are read together; windows do not overlap. limit: use only so many tokens.
    dtype: of everything that is
    not packed. device: None takes the GPU if there is one. Raises ConfigError for less than two
    tokens.
    """
    return evaluate_texts(model, {"text": input_ids}, base, window, limit, dtype, device)["text"]


@torch.no_grad()
def evaluate_texts(
    model: str | Path,
    texts: Mapping[str, Tensor],
    base: str | Path | None = None,
    window: int = 1024,
    limit: int | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
) -> dict[str, TextFigures | Divergence]:
    """`evaluate_text` on several texts, name → int64 [tokens]; each model is loaded once. limit: of
    tokens of each text."""
    for input_ids in texts.values():
        if len(input_ids[:limit]) < MIN_TEXTS or window < MIN_TEXTS:
            raise ConfigError(
                f"perplexity needs at least 2 tokens, got {len(input_ids[:limit])} in windows of "
                f"{window}."
            )

    place = usable_device(device)
    judged = _for_texts(model, dtype).to(place)
    original = None if base is None else _for_texts(base, dtype).to(place)

    found: dict[str, TextFigures | Divergence] = {}
    for name, input_ids in texts.items():
        if original is not None:
            found[name] = divergence(original, judged, input_ids, window, limit)
            continue

        losses = token_losses(judged, input_ids, window, limit).double()
        mean = float(losses.mean())
        found[name] = TextFigures(len(losses), mean, exp_of(mean), perplexity_interval(losses))

    return found


def evaluate_embeddings(
    model: str | Path,
    texts: str | Path,
    base: str | Path | None = None,
    column: str = "text",
    prompt_name: str | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
) -> EmbeddingDrift | PairFigures:
    """An embedding model's figures on a file of texts, or of scored pairs (.tsv: score, sentence,
    sentence).

    Texts need `base`, since a cosine drift is one from somewhere; pairs can be judged alone.
    Raises CalibrationError for files that cannot be read, ConfigError for texts without a base.
    """
    path = Path(texts)
    if not path.is_file():
        raise CalibrationError(f"text file {path} does not exist.")

    pairs = scored_pairs(path) if path.suffix.lower() == ".tsv" else None
    listed = texts_to_compare(path, column) if pairs is None else [*pairs[1], *pairs[2]]
    if pairs is None and base is None:
        raise ConfigError(
            "texts show how far embeddings moved from those of --base; give it, or a .tsv of "
            "scored pairs."
        )

    after = _embedded(model, listed, prompt_name, dtype, device)
    if base is not None:
        return judge(_embedded(base, listed, prompt_name, dtype, device), after, pairs)

    scores = pairs[0] if pairs is not None else []
    return PairFigures(
        len(scores), pair_spearman(after[: len(scores)], after[len(scores) :], scores)
    )


def texts_to_compare(path: Path, column: str = "text") -> list[str]:
    """Texts of a user's file for an embedding model, one a line where no empty lines part them.

    Raises CalibrationError when there are fewer than two: a text alone has no neighbours.
    """
    texts = file_texts(path, column, text_per_line=True)
    if len(texts) < 2:
        raise CalibrationError(f"{path} holds one text; embeddings are compared on two or more.")
    return texts


def scored_pairs(path: Path) -> tuple[list[float], list[str], list[str]]:
    """`read_pairs` of a user's file. Raises CalibrationError when it holds no pairs."""
    try:
        pairs = read_pairs(path)
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"{path} does not hold lines of score, sentence and sentence: {error}."
        ) from error

    if not pairs[0]:
        raise CalibrationError(
            f"{path} holds no line of score, sentence and sentence, separated by tabs."
        )
    return pairs


def _embedded(
    model: str | Path,
    texts: list[str],
    prompt_name: str | None,
    dtype: Any,
    device: Any,
) -> Tensor:
    encoder = Encoder.from_pretrained(str(model), device=device, dtype=dtype)
    return embeddings_of(encoder, texts, prompt_name=prompt_name)
