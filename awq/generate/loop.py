"""The decode loop that takes the place of transformers' own inside `model.generate`.

transformers prepares everything: lengths, logits processors, stopping criteria, special tokens. What it would hand to its
greedy and sampling loop is handed to `sample` here; beam search and all else keep transformers' loops. On a GPU the next
step is under way before the host looks at the tokens of the last one, so looking costs no time.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput

from awq.errors import ConfigError
from awq.generate.decoder import FusedDecoder

logger = logging.getLogger("awq.generate")

_OUR_MODES = ("greedy_search", "sample")
_HARMLESS = {"use_cache", "logits_to_keep", "num_logits_to_keep", "cache_position", "attention_mask", "past_key_values",
             "position_ids", "token_type_ids", "tokenizer"}  # fmt: skip


def why_not(model: Any, kwargs: dict[str, Any]) -> str | None:
    """Why a call of `generate` with these keyword arguments goes through transformers' own loop, or None."""
    config = kwargs.get("generation_config") or model.generation_config
    settings = {k: v for k, v in kwargs.items() if k in config.to_dict()}
    merged = type(config).from_dict({**config.to_dict(), **settings})
    mode = merged.get_generation_mode(kwargs.get("assistant_model"))
    if mode.value not in _OUR_MODES:
        return f"{mode.value.replace('_', ' ')} is transformers' own"
    wanted = [n for n in ("output_attentions", "output_hidden_states") if getattr(merged, n, None)]
    if wanted:
        return f"{', '.join(wanted)}: fused blocks keep none"
    if merged.use_cache is False:
        return "use_cache=False"
    for name in ("inputs_embeds", "past_key_values", "custom_generate", "cache_implementation", "guidance_scale"):
        if kwargs.get(name) is not None:
            return f"{name} is given"
    return None


@contextmanager
def own_loop(model: Any, loop: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Inside, `model.generate(**given)` with what this yields runs `loop` in place of transformers' `_sample`."""
    parameter = inspect.signature(GenerationMixin.generate).parameters.get("custom_generate")
    if parameter is not None and "Callable" in str(parameter.annotation):
        yield {"custom_generate": loop}
        return
    model._sample = functools.partial(loop, model)  # releases before custom_generate took a function
    try:
        yield {}
    finally:
        del model._sample


def make_loop(decoder: FusedDecoder, generator: torch.Generator | None = None) -> Callable[..., Any]:
    """The function that transformers' generate calls; generator: source of random numbers for sampling."""

    def loop(
        model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        synced_gpus: bool = False, streamer: Any = None, **model_kwargs: Any,
    ) -> Any:  # fmt: skip
        unknown = sorted(k for k, v in model_kwargs.items() if k not in _HARMLESS and v is not None)
        if unknown:
            raise ConfigError(f"generate() got {', '.join(unknown)}, which a fused model does not take; load with fuse_layers=False.")
        run = _Run(decoder, input_ids, model_kwargs.get("attention_mask"), generation_config, generator)
        return run(logits_processor, stopping_criteria, streamer)

    return loop


class _Run:
    """One call of generate."""

    def __init__(self, decoder: FusedDecoder, ids: Tensor, mask: Tensor | None, config: Any, generator: Any) -> None:
        self.decoder, self.config, self.generator = decoder, config, generator
        self.ids = ids.to(decoder.device)
        mask = torch.ones_like(self.ids) if mask is None else mask.to(decoder.device)
        self.room = config.max_length - ids.shape[1]
        self.lengths = mask.sum(1).tolist()
        if min(self.lengths) == 0:
            raise ConfigError("a prompt of the batch is empty: its attention_mask is 0 everywhere.")
        if max(self.lengths) + self.room > decoder.max_seq_len:
            raise ConfigError(
                f"{max(self.lengths)} prompt tokens and up to {self.room} new ones do not fit max_seq_len={decoder.max_seq_len}; "
                "ask for fewer (max_new_tokens) or load with a larger max_seq_len."
            )
        order = mask.argsort(dim=1, descending=True, stable=True)  # true tokens first: rows of the cache have no padding
        self.prompts = self.ids.gather(1, order)[:, : max(self.lengths)]

    def __call__(self, processors: Any, criteria: Any, streamer: Any) -> Any:
        decoder, config, batch = self.decoder, self.config, len(self.ids)
        ahead = decoder.device.type == "cuda"
        ids = torch.cat([self.ids, self.ids.new_zeros(batch, max(self.room, 0))], 1)
        width, pad = self.ids.shape[1], getattr(config, "_pad_token_tensor", None)
        going = torch.ones(batch, dtype=torch.bool, device=decoder.device)
        ends = any(hasattr(c, "eos_token_id") for c in criteria)
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=decoder.device)
        kept: dict[str, list] = {"scores": [], "logits": []}
        logits = decoder.prefill(self.prompts, self.lengths)
        longest = max(self.lengths)
        for step in range(self.room):
            scores = processors(ids[:, : width + step], logits)
            self._keep(kept, scores, logits)
            token = self._choose(scores)
            if ends and pad is not None:
                token = torch.where(going, token, pad.to(token.device))
            ids[:, width + step] = token
            going = going & ~criteria(ids[:, : width + step + 1], scores).to(going.device)
            read = _Read(token, going)
            last = step + 1 == self.room
            if ahead and not last:
                logits = decoder.step(token, lengths, longest)
            token_here, more = read.wait()
            if streamer is not None:
                streamer.put(token_here)
            if not more or last:
                width += step + 1
                break
            if not ahead:
                logits = decoder.step(token, lengths, longest)
            lengths, longest = lengths + 1, longest + 1
        if streamer is not None:
            streamer.end()
        sequences = ids[:, :width].clone()
        if not config.return_dict_in_generate:
            return sequences
        found = {name: tuple(tensors) or None for name, tensors in kept.items()}
        return GenerateDecoderOnlyOutput(sequences=sequences, **found)  # type: ignore[arg-type]

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


class _Read:
    """Tokens, and whether any row goes on, on their way to the host."""

    def __init__(self, token: Tensor, going: Tensor) -> None:
        both = torch.cat([token, going.any().unsqueeze(0).to(token.dtype)])
        self.event = None
        if both.is_cuda:
            self.host = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
            self.host.copy_(both, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host = both

    def wait(self) -> tuple[Tensor, bool]:
        if self.event is not None:
            self.event.synchronize()
        return self.host[:-1].clone(), bool(self.host[-1])
