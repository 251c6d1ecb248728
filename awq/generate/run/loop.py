"""The decode loop that takes the place of transformers' own inside `model.generate`.

transformers prepares everything: lengths, logits processors, stopping criteria, special tokens.
What it would hand to its greedy and sampling loop is handed to `sample` here; beam search and all
else keep transformers' loops. On a GPU the next step is under way before the host looks at the
tokens of the last one, so looking costs no time.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from awq.errors import ConfigError
from awq.generate.run.decoder import FusedDecoder
from awq.generate.run.greedy import MOST_ENDS, Mail, Rules, cores_for
from awq.generate.run.static import StaticDecoder
from awq.nn.locks import lock_of

logger = logging.getLogger("awq.generate")

_OUR_MODES = ("greedy_search", "sample")
_THEIRS = (
    "inputs_embeds",
    "past_key_values",
    "position_ids",
    "token_type_ids",
    "custom_generate",
    "cache_implementation",
    "guidance_scale",
)
# Keyword arguments of a forward that change nothing here: a fused decoder always caches and
# computes the last logits.
_HARMLESS = {
    "input_ids",
    "inputs",
    "attention_mask",
    "use_cache",
    "logits_to_keep",
    "num_logits_to_keep",
    "cache_position",
    "tokenizer",
}


def why_not(model: Any, kwargs: dict[str, Any]) -> str | None:
    """Why a call of `generate` with these keyword arguments goes through transformers' own loop, or
    None."""
    config = kwargs.get("generation_config") or model.generation_config
    settings = {k: v for k, v in kwargs.items() if k in config.to_dict()}
    merged = type(config).from_dict({**config.to_dict(), **settings})
    mode = merged.get_generation_mode(kwargs.get("assistant_model"))
    if mode.value not in _OUR_MODES:
        return f"{mode.value.replace('_', ' ')} is transformers' own"

    wanted = [n for n in ("output_attentions", "output_hidden_states") if getattr(merged, n, None)]
    if wanted:
        return f"{', '.join(wanted)}: fused blocks keep none"
    # Files of models hold it as a setting of training (MPT, and what AutoAWQ's example has saved):
    # that is no wish of this call, and the tokens are the same.
    by_the_model = "use_cache" not in kwargs and model.generation_config.use_cache is False
    if merged.use_cache is False and not by_the_model:
        return "use_cache=False"

    for name in _THEIRS:
        if kwargs.get(name) is not None:
            return f"{name} is given"

    for name in _model_inputs(kwargs, config):
        return f"{name} is an input of the model's own forward"

    return None


def _model_inputs(kwargs: dict[str, Any], config: Any) -> list[str]:
    """Names of the keyword arguments that `generate` would hand through to the model's forward, and
    that matter there."""
    own = inspect.signature(GenerationMixin.generate).parameters
    known = {*own, *config.to_dict(), *_HARMLESS, *_THEIRS}
    return sorted(name for name, value in kwargs.items() if value is not None and name not in known)


def generate_fused(
    model: Any,
    decoder: FusedDecoder | StaticDecoder,
    generator: torch.Generator | None = None,
    **kwargs: Any,
) -> Any:
    """`model.generate(**kwargs)` with the decoder's loop in place of transformers' `_sample`.

    Waits for other threads, since the decoder has one cache. generator: source of random numbers
    for sampling.
    """
    loop = make_loop(decoder, generator, kwargs.get("streamer"))
    with lock_of(model):
        decoder.running = True
        try:
            if _takes_a_loop():
                return model.generate(**kwargs, custom_generate=loop)
            twin = copy.copy(model)  # the model's own `_sample` may be running in other threads
            twin._sample = functools.partial(loop, twin)
            return twin.generate(**kwargs)
        finally:
            decoder.running = False


def _takes_a_loop() -> bool:
    """Whether this transformers takes a function as `custom_generate`."""
    parameter = inspect.signature(GenerationMixin.generate).parameters.get("custom_generate")
    return parameter is not None and "Callable" in str(parameter.annotation)


def make_loop(
    decoder: FusedDecoder | StaticDecoder,
    generator: torch.Generator | None = None,
    streamer: Any = None,
) -> Callable[..., Any]:
    """The function that transformers' generate calls; generator: source of random numbers for
    sampling.

    streamer: that of the call; transformers does not hand it to a function given as
    `custom_generate`. Of the keyword arguments that transformers has prepared for its own loop
    (caches, positions; every release has others)
    only the attention mask is read: what the caller gave has been judged by `why_not`.
    """

    def loop(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        device: Any = nullcontext()
        if decoder.device.type == "cuda":
            device = torch.cuda.device(decoder.device)

        try:
            with device, torch.inference_mode():
                run = _Run(
                    decoder,
                    input_ids,
                    model_kwargs.get("attention_mask"),
                    generation_config,
                    generator,
                )
                result = run(logits_processor, stopping_criteria, streamer)
        finally:
            decoder.release(len(input_ids))

        return _ordinary(result)

    return loop


def _ordinary(result: Any) -> Any:
    """The result in tensors that training may use: those made in inference mode it may not."""
    if isinstance(result, Tensor):
        return result.clone()

    for name, value in result.items():
        result[name] = (
            tuple(t.clone() for t in value) if isinstance(value, tuple) else value.clone()
        )
    return result


class _Run:
    """One call of generate."""

    def __init__(
        self,
        decoder: FusedDecoder | StaticDecoder,
        ids: Tensor,
        mask: Tensor | None,
        config: Any,
        generator: Any,
    ) -> None:
        self.decoder = decoder
        self.config = config
        self.generator = generator
        self.ids = ids.to(decoder.device, torch.int64)
        mask = torch.ones_like(self.ids) if mask is None else (mask.to(decoder.device) != 0).long()
        self.room = config.max_length - ids.shape[1]
        self.lengths = mask.sum(1).tolist()
        self.padding = [ids.shape[1] - length for length in self.lengths]
        if min(self.lengths) == 0:
            raise ConfigError("a prompt of the batch is empty: its attention_mask is 0 everywhere.")

        longest = ids.shape[1] if decoder.counts_padding else max(self.lengths)
        if longest + self.room > decoder.max_seq_len:
            raise ConfigError(
                f"{longest} prompt tokens and up to {self.room} new ones do not fit "
                f"max_seq_len={decoder.max_seq_len}; "
                "ask for fewer (max_new_tokens), or load with a larger max_seq_len or with "
                "fuse_layers=False."
            )

        # true tokens first: rows of the cache have no padding
        order = mask.argsort(dim=1, descending=True, stable=True)
        self.prompts = self.ids.gather(1, order)[:, : max(self.lengths)]

    def __call__(self, processors: Any, criteria: Any, streamer: Any) -> Any:
        rules = self._greedy_rules(processors, criteria)
        kept: dict[str, list] = {"scores": [], "logits": []}
        if rules is not None:
            sequences = self._greedy(rules, streamer)
        else:
            sequences = self._one_by_one(processors, criteria, streamer, kept)

        if streamer is not None:
            streamer.end()
        if not self.config.return_dict_in_generate:
            return sequences

        found = {name: tuple(tensors) or None for name, tensors in kept.items()}

        return GenerateDecoderOnlyOutput(sequences=sequences, **found)  # type: ignore[arg-type]

    def _greedy_rules(self, processors: Any, criteria: Any) -> Rules | None:
        """When rows end, where the likeliest token is all that is asked; else None."""
        config = self.config
        wanted = config.return_dict_in_generate and (config.output_scores or config.output_logits)
        if config.do_sample or len(processors) or wanted:
            return None

        room = self.room
        ends = []
        padding = None

        for criterion in criteria:
            if type(criterion) is MaxLengthCriteria:
                room = min(room, criterion.max_length - self.ids.shape[1])
            elif type(criterion) is EosTokenCriteria:
                ends += criterion.eos_token_id.flatten().tolist()
                padding = getattr(config, "_pad_token_tensor", None)
            else:
                return None

        if room < 1 or len(ends) > MOST_ENDS:
            return None

        return Rules(room, ends, None if padding is None else int(padding))

    def _greedy(self, rules: Rules, streamer: Any) -> Tensor:
        """The sequences of a call whose tokens the decoder chooses."""
        decoder = self.decoder
        batch = len(self.ids)
        logits = self._prefill()
        longest = max(self.lengths)
        state = decoder.greedy(batch)
        state.begin(logits, self.lengths, rules.ends, rules.padding)
        mail = Mail(state.found)
        tokens = []

        for step in range(rules.room):
            mail.send(state.found)
            last = step + 1 == rules.room
            if mail.ahead and not last:  # under way before the host looks
                decoder.greedy_step(state, longest)

            found = mail.take()
            tokens.append(found[:-1])
            if streamer is not None:
                streamer.put(found[:-1])
            if not found[-1] or last:
                break

            if not mail.ahead:
                decoder.greedy_step(state, longest)

            longest += 1

        new = torch.stack(tokens, 1).to(self.ids.device)

        return torch.cat([self.ids, new], 1)

    def _one_by_one(
        self,
        processors: Any,
        criteria: Any,
        streamer: Any,
        kept: dict[str, list],
    ) -> Tensor:
        """The sequences of a call that looks at scores; `kept` gets those that are wanted."""
        decoder = self.decoder
        config = self.config
        batch = len(self.ids)
        ids = torch.cat([self.ids, self.ids.new_zeros(batch, max(self.room, 0))], 1)
        width = self.ids.shape[1]
        watch = _Watch(criteria, config, ids)
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=decoder.device)
        logits = self._prefill()
        longest = max(self.lengths)

        for step in range(self.room):
            with cores_for(logits):
                scores = processors(ids[:, : width + step], logits)
                self._keep(kept, scores, logits)
                token = self._choose(scores)
                watch.put(token, scores, width + step)

            last = step + 1 == self.room
            if watch.ahead and not last:  # under way before the host looks
                logits = decoder.step(token, lengths, longest)

            token_here, more = watch.get()
            if streamer is not None:
                streamer.put(token_here)
            if not more or last:
                width += step + 1
                break

            if not watch.ahead:
                logits = decoder.step(token, lengths, longest)

            lengths = lengths + 1
            longest = longest + 1

        return ids[:, :width].clone()

    def _prefill(self) -> Tensor:
        if self.decoder.counts_padding:
            return self.decoder.prefill(self.prompts, self.lengths, self.padding)
        return self.decoder.prefill(self.prompts, self.lengths)

    def _choose(self, scores: Tensor) -> Tensor:
        if self.config.do_sample:
            return torch.multinomial(scores.softmax(-1), 1, generator=self.generator).squeeze(1)
        return scores.argmax(-1)

    def _keep(self, kept: dict[str, list], scores: Tensor, logits: Tensor) -> None:
        if self.config.return_dict_in_generate:
            if self.config.output_scores:
                kept["scores"].append(scores.clone())  # the next step overwrites logits
            if self.config.output_logits:
                kept["logits"].append(logits.clone())


class _Watch:
    """Writes tokens to the sequences, says which rows go on, and brings both to the host.

    On a GPU the next step is started before the host looks. Rows that have ended get the padding
    token; what the model makes of them is not looked at.
    """

    def __init__(self, criteria: Any, config: Any, ids: Tensor) -> None:
        rows = len(ids)
        self.criteria = criteria
        self.ids = ids
        self.pad = None
        if any(hasattr(criterion, "eos_token_id") for criterion in criteria):
            self.pad = getattr(config, "_pad_token_tensor", None)

        self.going = torch.ones(rows, dtype=torch.bool, device=ids.device)
        self.mail = Mail(ids.new_empty(rows + 1))

    @property
    def ahead(self) -> bool:
        """Whether the next step may be started before `get`."""
        return self.mail.ahead

    def put(self, token: Tensor, scores: Tensor, place: int) -> None:
        """token int64 [batch], chosen from scores, comes to column `place`."""
        self.mail.send(self._note(token, scores, place))

    def _note(self, token: Tensor, scores: Tensor, place: int) -> Tensor:
        """[batch + 1]: the tokens that were written, and whether any row goes on."""
        if self.pad is not None:
            pad = self.pad.to(token.device)
            token = torch.where(self.going, token, pad)

        stop = place + 1
        self.ids[:, place] = token
        written = self.ids[:, :stop]
        ended = self.criteria(written, scores).to(self.going.device)
        self.going = self.going & ~ended
        any_goes_on = self.going.any().unsqueeze(0)

        return torch.cat([token, any_goes_on.to(token.dtype)])

    def get(self) -> tuple[Tensor, bool]:
        """The token of each row on the host, and whether any row goes on."""
        found = self.mail.take()
        return found[:-1], bool(found[-1])
