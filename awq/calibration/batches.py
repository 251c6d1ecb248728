"""Masked batches of token ids: streams packed into full rows for decoders, one text per row for
encoders."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from awq.calibration.chats import chat_text
from awq.calibration.request import CalibrationRequest, is_tokenizer, read_request
from awq.calibration.sources import bundled_chats, bundled_texts, bundled_tool_chats
from awq.calibration.templates import TemplateTimeout
from awq.calibration.tokens import Row, tokenize
from awq.errors import CalibrationError

logger = logging.getLogger("awq.calibration")

BATCH_TOKENS = 4096
MAX_COUNT = 1 << 20  # samples, or tokens of a sample
MAX_TEXTS_PER_ROW = 64  # texts read for each row wanted: empty ones give none
PASSAGES_PER_CHAT = 8
GENERAL_SHARE = 0.6  # of the weight of all tokens, where the bundled text joins a caller's texts
MAX_WEIGHT = 4.0  # of a caller's token: the mean of all is 1
MIN_SPELLED_SHARE = 0.1  # of the bundled texts
# no script has so long tokens: more of the text than of it was used is gone
MIN_CUT_CHARACTERS_PER_TOKEN = 20


class CalibrationBatch(NamedTuple):
    """input_ids, attention_mask: int64 [batch, tokens], mask 1 on real tokens. extra: other inputs,
    as token_type_ids or pixel_values. weight: how much each of its tokens counts in the statistics
    of inputs. decoder: the ids are what a decoder reads; its encoder reads what is in `extra`, as
    sound."""

    input_ids: Tensor
    attention_mask: Tensor
    extra: dict[str, Tensor] = {}
    weight: float = 1.0
    decoder: bool = False

    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments for the model's forward."""
        whose = "decoder_" if self.decoder else ""
        ids = self.input_ids
        mask = self.attention_mask
        return {f"{whose}input_ids": ids, f"{whose}attention_mask": mask, **self.extra}


def load_calibration(
    data: Any = None,
    tokenizer: Any = None,
    *,
    split: str = "train",
    text_column: str = "text",
    max_samples: int = 128,
    max_length: int = 512,
    mode: str = "pack",
    pad_id: int | None = None,
) -> list[CalibrationBatch]:
    """Batches of about 4,096 tokens from any kind of calibration data.

    data: whatever `read_request` takes: None (the bundled text), a dataset name or local file,
    texts, chats, pairs of texts (one row each, as a cross-encoder reads them), lists of token ids,
    a [samples, tokens] tensor, id tensors of different lengths, or tokenizer outputs, whose masks
    and token types are kept; or the `CalibrationRequest` itself.
    mode: "pack" joins the samples into one stream and cuts it into rows of max_length (decoders; at
    most max_samples rows); "rows" keeps one sample per row, padded and masked (encoders; at most
    max_samples rows): a long text keeps its first max_length tokens with the special ones, long
    token ids become several rows. Raises CalibrationError when the data is empty or not understood.

    >>> [batch] = load_calibration([[4, 5, 6], [7, 8]], mode="rows", pad_id=0)
    >>> batch.input_ids.tolist(), batch.attention_mask.tolist()
    ([[4, 5, 6], [7, 8, 0]], [[1, 1, 1], [1, 1, 0]])
    """
    if mode not in ("pack", "rows"):
        raise CalibrationError(f"mode is {mode!r}; use 'pack' or 'rows'.")

    check_count("max_samples", max_samples)
    check_count("max_length", max_length)
    padding = pad_id if pad_id is not None else getattr(tokenizer, "pad_token_id", None)
    request = read_request(
        data,
        None,
        tokenizer,
        split=split,
        text_column=text_column,
        text_per_line=mode == "rows",
        pad_id=padding,
        limit=max_samples * 8,
    )
    rows = _token_rows(request, max_samples, max_length, mode)
    if not rows:
        raise CalibrationError(
            "the calibration data is empty; give at least one text with at least one token."
        )

    if mode == "pack" and not request.whole_rows:
        rows = _packed(rows, max_length)
    else:
        rows = [part for row in rows for part in _pieces(row, max_length)]

    return _batches(rows[:max_samples], padding or 0)


def check_count(name: str, value: Any) -> None:
    """Raises CalibrationError unless `value` is a whole number from 1 to MAX_COUNT."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not 1 <= value <= MAX_COUNT:
        raise CalibrationError(
            f"{name} is {value!r}; it must be a whole number of at least 1 and at most {MAX_COUNT}."
        )


def _token_rows(
    request: CalibrationRequest,
    max_samples: int,
    max_length: int,
    mode: str,
) -> list[Row]:
    """Rows of ids without padding; those of texts are cut already in mode "rows"."""
    if request.kind == "ids":
        return request.rows

    texts: Sequence[Any] = request.samples
    if request.kind == "bundled":
        logger.warning(
            "calibrating on the bundled text; texts of your own task give better results."
        )
        texts = bundled_texts(short=mode == "rows")
        if is_tokenizer(request.tokenizer):
            texts = spelled_texts(texts, request.tokenizer)

    if not texts:
        return []
    if request.kind == "chats" or not is_tokenizer(request.tokenizer):
        raise CalibrationError(
            "calibration texts need a tokenizer: quantize(tokenizer, calib_data=texts)."
        )
    if mode == "pack":
        return tokenize(request.tokenizer, texts, special=False, enough=max_samples * max_length)

    if request.kind == "bundled":
        texts = [texts[i] for i in evenly_spread(len(texts), max_samples)]
    rows = tokenize(request.tokenizer, texts[: max_samples * MAX_TEXTS_PER_ROW], max_length)
    _warn_of_cuts(texts, rows[:max_samples], max_length)

    return rows


def _warn_of_cuts(texts: Sequence[Any], rows: list[Row], max_length: int) -> None:
    """A warning when most of the texts was cut away: then a file of lines was likely taken for one
    text."""
    used = sum(len(row["input_ids"]) for row in rows)
    given = sum(len(text) if isinstance(text, str) else sum(map(len, text)) for text in texts)
    cut = [row for row in rows if len(row["input_ids"]) >= max_length]
    if cut and given > MIN_CUT_CHARACTERS_PER_TOKEN * used and len(rows) >= len(texts):
        logger.warning(
            "%d of %d calibration texts are longer than %d tokens, and most of what was given is "
            "cut away (%d characters, "
            "%d tokens used); give shorter texts.",
            len(cut),
            len(texts),
            max_length,
            given,
            used,
        )


def _packed(rows: list[Row], length: int) -> list[Row]:
    """One stream of all ids in rows of `length`. A short remainder is kept only when there is
    nothing else."""
    stream = [i for row in rows for i in row["input_ids"]]
    cut = [stream[i : i + length] for i in range(0, len(stream), length)]
    full = [ids for ids in cut if len(ids) == length]
    return [{"input_ids": ids} for ids in full or cut]


def _pieces(row: Row, length: int) -> list[Row]:
    starts = range(0, len(row["input_ids"]), length)
    return [
        {key: values[start : start + length] for key, values in row.items()} for start in starts
    ]


def evenly_spread(items: int, count: int) -> list[int]:
    """At most `count` indices below `items`, evenly spread.

    >>> evenly_spread(10, 4)
    [0, 2, 5, 7]
    """
    if count < items:
        return [i * items // count for i in range(count)]
    return list(range(items))


def _batches(rows: list[Row], pad: int, tokens: int = BATCH_TOKENS) -> list[CalibrationBatch]:
    """Rows sorted by length (stable) in batches of about `tokens` padded tokens."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
    batches = []
    start = 0
    while start < len(ordered):
        longest = len(ordered[start]["input_ids"])
        part = ordered[start : start + max(1, tokens // longest)]
        start += len(part)
        keys = dict.fromkeys(
            key for row in part for key in row if key not in ("input_ids", "attention_mask")
        )
        ones = [row.get("attention_mask", [1] * len(row["input_ids"])) for row in part]
        extra = {key: _padded([row.get(key, []) for row in part], longest, 0) for key in keys}
        batches.append(
            CalibrationBatch(
                _padded([r["input_ids"] for r in part], longest, pad),
                _padded(ones, longest, 0),
                extra,
            )
        )

    return batches


def _padded(rows: list[list[int]], length: int, fill: int) -> Tensor:
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows], dtype=torch.long)


def with_general_rows(
    own: Sequence[CalibrationBatch],
    tokenizer: Any,
    samples: int,
    passages: Sequence[str] | None = None,
) -> list[CalibrationBatch]:
    """The caller's batches, and batches of the bundled text of their longest row's length.

    Both together have twice `samples` rows: few rows of one's own leave room for more general ones,
    since a Gram matrix of few tokens holds for no other. General tokens count `GENERAL_SHARE` of
    all, but no token of the caller more than `MAX_WEIGHT` times. passages: as `general_texts` takes
    them.
    """
    rows = _count_rows(own)
    longest = max(b.input_ids.shape[1] for b in own)
    wanted = max(rows, 2 * samples - rows)
    general = load_calibration(
        general_texts(tokenizer, passages), tokenizer, max_samples=wanted, max_length=longest
    )
    joined = _count_rows(general)
    every = rows + joined
    weight = min(MAX_WEIGHT, (1 - GENERAL_SHARE) * every / rows)
    rest = (every - weight * rows) / joined

    return [b._replace(weight=weight) for b in own] + [b._replace(weight=rest) for b in general]


def _count_rows(batches: Sequence[CalibrationBatch]) -> int:
    return sum(len(batch.input_ids) for batch in batches)


def general_texts(tokenizer: Any, passages: Sequence[str] | None = None) -> list[str]:
    """Bundled passages that the tokenizer can spell; after every eighth one a bundled chat, in the
    model's own template.

    Models that answer in chats are served nothing but text in their template. passages: some of the
    bundled ones; None: all.
    """
    texts = spelled_texts(bundled_texts() if passages is None else passages, tokenizer)
    for place, chat in enumerate(rendered_chats(tokenizer)):
        texts.insert((place + 1) * (PASSAGES_PER_CHAT + 1) - 1, chat)
    return texts


def rendered_chats(tokenizer: Any) -> list[str]:
    """The bundled chats through the tokenizer's template; none without one, and without those that
    it does not take.

    Chats with tool calls come first, where the template knows of tools: another one would drop the
    calls and keep empty turns.
    """
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        return []

    chats: list[dict[str, Any]] = [{"messages": chat} for chat in bundled_chats()]
    if "tool_calls" in str(template):
        chats = bundled_tool_chats() + chats

    texts = []
    for chat in chats:
        try:
            texts.append(chat_text(chat["messages"], tokenizer, chat.get("tools")))
        except TemplateTimeout as error:
            logger.warning("no bundled chats join the calibration text: %s", error)
            return []
        except CalibrationError as error:  # some templates know no system role
            logger.debug("a bundled chat is left out: %s", error)

    return texts


def spelled_texts(texts: Sequence[str], tokenizer: Any) -> list[str]:
    """Those of the bundled texts that the tokenizer can spell: none of its special ids stands in
    them, `[UNK]` included.

    Nobody serves a model texts that it cannot read, and such an id would weigh in every Gram
    matrix. All texts stay when
    fewer than a tenth can be spelled: then the tokenizer is not made for text.
    """
    special = set(getattr(tokenizer, "all_special_ids", ()))
    spelled = [
        t
        for t in texts
        if not special.intersection(
            tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"]
        )
    ]
    return spelled if len(spelled) >= MIN_SPELLED_SHARE * len(texts) else list(texts)


def rebatched(
    batches: Sequence[CalibrationBatch], tokens: int = BATCH_TOKENS
) -> list[CalibrationBatch]:
    """The same rows in batches of about `tokens`, which depend on the rows alone, not on how they
    were padded or put together.

    Padding at the ends of rows goes, rows of one weight are sorted by length (stable) and padded
    again, on the right. Sums in floating point depend on shapes, so this is what makes quantized
    weights equal bit for bit with and without padding. Batches stay as they are when `extra` holds
    something that is not [batch, tokens].
    """
    if any(
        value.shape != b.input_ids.shape or value.is_floating_point()
        for b in batches
        for value in b.extra.values()
    ):
        return list(batches)

    rows: dict[float, list[Row]] = {}
    for batch in batches:
        for i, mask in enumerate(batch.attention_mask.bool()):
            places = mask.nonzero().flatten().tolist()
            if places:
                part = slice(places[0], places[-1] + 1)
                row = {key: value[i, part].tolist() for key, value in batch.model_inputs().items()}
                rows.setdefault(batch.weight, []).append(row)

    return [
        batch._replace(weight=weight)
        for weight, alike in rows.items()
        for batch in _batches(alike, 0, tokens)
    ]
