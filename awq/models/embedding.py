"""`AwqEmbeddingModel`: what `AutoAWQForEmbedding` returns. Calibrates on texts as the model will be
asked: with its prompts, up to its own length; and says how far the embeddings moved, on texts that
were not calibrated on.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from awq.calibration import clean_texts
from awq.calibration.batches import evenly_spread, spelled_texts
from awq.calibration.request import CalibrationRequest, read_request, tell_apart
from awq.calibration.sources import bundled_texts
from awq.calibration.tokens import tokenize
from awq.checkpoint.companions import source_directory
from awq.embed.encoder import Encoder
from awq.embed.heads import through_heads
from awq.errors import CalibrationError, ConfigError
from awq.evals.similarity import judge
from awq.models.arguments import check_quantizer
from awq.models.model import AwqModel
from awq.quantize import QuantReport
from awq.quantize.match import Embed

# Parameters below which a count of calibration texts is enough: upper ends of the usual advice for
# small, medium and large.
_SAMPLES = ((200e6, 256), (1e9, 1024), (float("inf"), 2048))
_HELD_OUT = 256
GENERAL_SENTENCES = 3072  # of the bundled text, which join the texts of the task
# AutoAWQ's, accepted and not needed
_IGNORED = ("n_parallel_calib_samples", "max_chunk_memory")


class AwqEmbeddingModel(AwqModel):
    """An encoder (`.model`) with `quantize` on texts and `encode`."""

    _encoder: tuple[Encoder, tuple] | None = None

    @property
    def encoder(self) -> Encoder:
        """The model with the pooling, heads and prompts of its directory; the same one as long as
        the model stays where it is."""
        made_of = (self.model, self.tokenizer, self.path, next(self.model.parameters()).device)
        if self._encoder is None or any(
            a is not b and a != b for a, b in zip(self._encoder[1], made_of)
        ):
            root = source_directory(self.path) or self.path
            self._encoder = (
                Encoder.around(self.model, root, self.tokenizer, self._trust_remote_code),
                made_of,
            )
        return self._encoder[0]

    def encode(self, texts: str | Sequence[str], **kwargs: Any) -> Tensor:
        """Embeddings, float32 [texts, features]; arguments are `Encoder.encode`'s."""
        return self.encoder.encode(texts, **kwargs)

    def quantize(
        self,
        tokenizer: Any = None,
        quant_config: Any = None,
        calib_data: Any = None,
        *,
        texts: Any = None,
        prompt_name: str | None = None,
        evaluate: Any = None,
        general_texts: bool = True,
        split: str = "train",
        text_column: str = "text",
        max_calib_samples: int | None = None,
        max_calib_seq_len: int = 512,
        **options: Any,
    ) -> QuantReport:
        """Quantizes the model in place and returns the report.

        texts (or calib_data, or the first argument): strings, pairs of strings, a file or dataset
        name, or {prompt name: texts}. Each gets its prompt (`prompt_name`, else the model's default
        one) and is cleaned by `clean_texts`. Token ids are taken as they are.
        max_calib_samples: None takes 256, 1024 or 2048 by the model's size, spread over the texts.
        evaluate: texts, or (scores, first, second) of sentence pairs, embedded before and after for
        `report.evaluation`; None takes up to 256 texts that calibration left over, False none.
        general_texts: the bundled text joins the calibration, so that what is embedded later may be
        of other kinds than `texts` (measured: docs/embeddings.md). Other arguments are
        `AutoAWQForCausalLM`'s.
        Raises ConfigError, CalibrationError or ModelError before any weight is touched.

        >>> from awq import AutoAWQForEmbedding
        >>> model = AutoAWQForEmbedding.from_pretrained("my-encoder", device_map="cpu")
        >>> report = model.quantize(texts=texts, quant_config={"q_group_size": 16})
        >>> model.save_quantized("my-encoder-awq")
        """
        data = calib_data if texts is None else texts
        data, given = tell_apart(tokenizer, data)
        if given is not None and not self._tokenizer_known:
            self.tokenizer = given

        # General texts are sentences here, and join below.
        check_quantizer(options.pop("quantizer_cls", None))
        for name in _IGNORED:
            options.pop(name, None)
        if "apply_clip" in options:
            options["clip"] = options.pop("apply_clip")

        others = {
            "split": split,
            "text_column": text_column,
            "max_calib_seq_len": max_calib_seq_len,
            "general_texts": False,
            **options,
        }
        self._checked(quant_config, max_calib_samples, max_calib_seq_len, **options)
        pad_id = self._pad_id() if given is None else getattr(given, "pad_token_id", None)
        request = read_request(
            data, split=split, text_column=text_column, text_per_line=True, pad_id=pad_id
        )
        if request.kind == "ids":
            if general_texts and self.tokenizer is not None:
                request = self._with_general_rows(
                    request, min(max_calib_seq_len, self.encoder.max_seq_length)
                )
            return self._quantize(
                request, quant_config, None, max_calib_samples=max_calib_samples, **others
            )
        if request.kind == "bundled":
            samples = max_calib_samples or GENERAL_SENTENCES
            return self._quantize(
                self.tokenizer, quant_config, None, max_calib_samples=samples, **others
            )
        if self.tokenizer is None:
            raise CalibrationError(f"{self.path} has no tokenizer; give one, or token ids.")

        request = request.with_tokenizer(self.tokenizer)
        encoder = self.encoder
        ready = [
            encoder.cased(text) for text in _with_prompts(encoder, _listed(request), prompt_name)
        ]
        if not ready:
            raise CalibrationError(
                "no calibration text is left after cleaning; give at least one that is not empty."
            )

        count = min(len(ready), max_calib_samples or self.sample_count())
        chosen = evenly_spread(len(ready), count)
        rest = sorted(set(range(len(ready))) - set(chosen))
        rest = rest[:: max(1, len(rest) // _HELD_OUT)][:_HELD_OUT]
        held_out, pairs, prompt = _to_judge(evaluate, [ready[i] for i in rest], prompt_name)
        before = encoder.encode(held_out, **prompt) if held_out else None
        others["max_calib_seq_len"] = min(max_calib_seq_len, encoder.max_seq_length)
        calibration = [ready[i] for i in chosen]

        if general_texts:
            known = {*ready, *held_out}
            calibration += [text for text in self._general_sentences() if text not in known]

        report = self._quantize(
            self.tokenizer, quant_config, calibration, max_calib_samples=len(calibration), **others
        )
        if before is not None:
            report.evaluation = judge(before, encoder.encode(held_out, **prompt), pairs)
        return report

    def _embedding(self) -> Embed | None:
        """The directory's own pooling and heads, on the device of what they are given."""
        if self.tokenizer is None:
            return None

        heads = copy.deepcopy(self.encoder.heads)

        def embed(hidden: Tensor, mask: Tensor) -> Tensor:
            return through_heads(heads.to(hidden.device), hidden, mask)

        return embed

    def _general_sentences(self) -> list[str]:
        """Sentences of the bundled text as the model would be asked with them."""
        sentences = spelled_texts(bundled_texts(short=True), self.tokenizer)
        chosen = [sentences[i] for i in evenly_spread(len(sentences), GENERAL_SENTENCES)]
        return [self.encoder.cased(text) for text in _with_prompts(self.encoder, chosen, None)]

    def _with_general_rows(
        self,
        request: CalibrationRequest,
        max_length: int,
    ) -> CalibrationRequest:
        """Token ids of the caller and those of the bundled sentences: which door they came through
        makes no difference."""
        rows = [*request.rows, *tokenize(self.tokenizer, self._general_sentences(), max_length)]
        return replace(request, rows=rows)

    def sample_count(self) -> int:
        """Calibration texts that a model of this size should get: 256, 1024 or 2048."""
        size = sum(p.numel() for p in self.model.parameters())
        return next(count for limit, count in _SAMPLES if size < limit)


def _listed(request: CalibrationRequest) -> dict[str, list[str]] | list[str]:
    """Strings by prompt name, or a list of them; pairs come apart."""
    if request.kind == "prompts":
        return request.prompts
    return request.texts or [text for pair in request.pairs for text in pair]


def _with_prompts(encoder: Encoder, texts: Any, prompt_name: str | None) -> list[str]:
    if isinstance(texts, dict) and prompt_name is not None:
        raise ConfigError(
            f"texts come by prompt name ({', '.join(texts)}); prompt_name {prompt_name!r} cannot "
            "be given as well."
        )

    named = texts.items() if isinstance(texts, dict) else [(prompt_name, texts)]
    return [encoder.prompt_text(name) + text for name, part in named for text in clean_texts(part)]


def _to_judge(
    evaluate: Any,
    rest: list[str],
    prompt_name: str | None,
) -> tuple[list[str], Any, dict[str, Any]]:
    """(texts to embed before and after, sentence pairs or None, arguments of encode)."""
    if evaluate is None or evaluate is False:
        # Prompts stand in the texts already. With fewer than 20 the neighbours of a text are all
        # the others.
        return (rest if len(rest) >= 20 and evaluate is None else []), None, {"prompt": ""}
    if isinstance(evaluate, tuple) and len(evaluate) == 3 and not isinstance(evaluate[0], str):
        return [*evaluate[1], *evaluate[2]], evaluate, {"prompt_name": prompt_name}

    found = clean_texts(evaluate)
    if len(found) < 2:
        raise ConfigError(
            f"evaluate holds {len(found)} different texts; give at least 2, or False."
        )
    return found, None, {"prompt_name": prompt_name}
