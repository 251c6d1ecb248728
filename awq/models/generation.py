"""`generate` of the object that AutoAWQ users hold: fused blocks where the model has them,
transformers' own elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from awq.errors import ConfigError
from awq.nn.locks import lock_of
from awq.nn.modes import ordinary_arithmetic
from awq.nn.surgery import output_head

if TYPE_CHECKING:
    from awq.generate import FusedDecoder, StaticDecoder

logger = logging.getLogger("awq.models")

# Arguments of `generate` beside token ids: what they mean is the model's own matter.
_GIVEN_AS_TENSORS = {
    "inputs_embeds",
    "pixel_values",
    "input_features",
    "decoder_input_ids",
    "past_key_values",
}


class Fusion(str):
    """How generation runs, and why not otherwise. As a string it reads "state: reason".

    state: "off" (not asked for), "pending" (built at the first `generate`), "fused", "partly fused"
    (some parts of blocks run in the model's own code, over the same cache), "captured"
    (transformers' own blocks, their step a CUDA graph) or "unfused". reason: why it is not fused,
    or which parts are not; empty for "fused".
    """

    state: str
    reason: str

    def __new__(cls, state: str, reason: str = "") -> Fusion:
        fusion = super().__new__(cls, f"{state}: {reason}" if reason else state)
        fusion.state, fusion.reason = state, reason
        return fusion

    def __reduce__(self) -> tuple[type[Fusion], tuple[str, str]]:
        """What copies and pickles are made from."""
        return type(self), (self.state, self.reason)


OFF = Fusion("off", "fuse_layers=False")
PENDING = Fusion("pending", "not fused yet")
FUSED = Fusion("fused")


def _how_far(decoder: FusedDecoder) -> Fusion:
    """Fused, or partly, with the reasons and the number of blocks that have each."""
    parts = decoder.plan.own_parts
    blocks = len(decoder.plan.blocks)
    if not parts:
        return FUSED

    reasons = "; ".join(f"{reason} ({count} of {blocks} blocks)" for reason, count in parts.items())
    return Fusion("partly fused", reasons)


class FusedGeneration:
    """Mixin of a class with a transformers model (`.model`) and its `.path`."""

    model: Any
    path: str
    _check_whole: Callable[[], None]

    def _stay_unfused(self) -> None:
        self._fusion = OFF
        self._fused: dict[str, Any] = {}
        self._decoder: FusedDecoder | None = None
        self._captured: StaticDecoder | None = None
        self._wants_capture = False

    def fuse_layers(
        self,
        max_seq_len: int = 2048,
        batch_size: int = 1,
        quantize_lm_head: bool = False,
        capture_unfused: bool = True,
    ) -> None:
        """Generation goes through fused blocks from now on, with a cache of `max_seq_len` tokens,
        prompt included, for each of `batch_size` rows; a larger batch makes it grow.
        quantize_lm_head: with a 4-bit head, rounded to nearest: a few percent faster, and not quite
        the same logits. capture_unfused: on a GPU the step of a model that cannot be fused is
        captured in a CUDA graph as transformers has it, proven first; it then generates up to
        `max_seq_len` tokens."""
        with lock_of(self.model):
            self.unfuse()
            self._wants_capture = capture_unfused
            self._fusion = PENDING
            self._fused = {
                "max_seq_len": max_seq_len,
                "batch_size": batch_size,
                "quantize_head": quantize_lm_head,
            }

    @torch.no_grad()
    def generate(
        self,
        *args: Any,
        max_seq_len: int | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' generate, with its arguments and results, through fused blocks where the
        model has them.

        max_seq_len: the total length, prompt included (AutoAWQ's name for max_length). generator:
        source of random numbers for sampling. A call that fused blocks cannot serve (beam search,
        hidden states …) goes through transformers' own loop on the same weights. Raises ConfigError
        when prompt and new tokens do not fit the `max_seq_len` of loading.
        """
        self._check_whole()
        if not hasattr(self.model, "generate") or output_head(self.model) is None:
            raise ConfigError(
                f"{type(self.model).__name__} is no language model; call it for last_hidden_state, "
                "or let `Encoder` (`awq embed`) make embeddings."
            )

        if (
            max_seq_len is not None
            and "max_length" not in kwargs
            and "max_new_tokens" not in kwargs
        ):
            kwargs["max_length"] = max_seq_len

        if args:
            kwargs["inputs"], args = args[0], args[1:]
        self._check(kwargs)
        ids = kwargs.get("inputs", kwargs.get("input_ids"))
        if isinstance(ids, Tensor) and ids.shape[0] == 1 and "attention_mask" not in kwargs:
            # one prompt has no padding; transformers would warn
            kwargs["attention_mask"] = torch.ones_like(ids)

        ending = getattr(self.model.generation_config, "eos_token_id", None)
        if (
            ending is not None
            and self.model.generation_config.pad_token_id is None
            and "generation_config" not in kwargs
        ):
            kwargs.setdefault("pad_token_id", ending[0] if isinstance(ending, list) else ending)

        return self._generate(*args, generator=generator, **kwargs)

    def _check(self, kwargs: dict[str, Any]) -> None:
        """What a language model is asked; other modalities and their placeholder ids are
        transformers' to judge."""
        from awq.generate.run.request import check_request

        if self.model.main_input_name == "input_ids" and not (_GIVEN_AS_TENSORS & kwargs.keys()):
            settings = kwargs.get("generation_config") or self.model.generation_config
            padding = kwargs.get("pad_token_id", getattr(settings, "pad_token_id", None))
            vocabulary = self.model.get_input_embeddings().weight.shape[0]
            check_request(vocabulary, kwargs, padding)

    def _generate(self, *args: Any, generator: torch.Generator | None, **kwargs: Any) -> Any:
        from awq.generate.run.loop import generate_fused, why_not

        # one cache, so one fused call at a time; and nobody takes the decoder apart meanwhile
        with lock_of(self.model):
            decoder = self.fuse() or self._captured
            reason = (
                str(self._fusion)
                if decoder is None
                else "positional arguments"
                if args
                else why_not(self.model, kwargs)
            )
            if decoder is not None and decoder.running:
                reason = "called from within a running generate, as by a streamer"
            if decoder is not None and reason is None:
                with ordinary_arithmetic():
                    return generate_fused(self.model, decoder, generator, **kwargs)

        if generator is not None:
            raise ConfigError(
                f"generate(generator=…) needs the fused loop ({reason}); use torch.manual_seed "
                "instead."
            )

        logger.debug("transformers' own loop: %s", reason)
        return self.model.generate(*args, **kwargs)

    @property
    def fusion(self) -> Fusion:
        """How generation runs; known after `fuse` or the first `generate`. Printed, it says why it
        is not fused."""
        return self._fusion

    def fuse(self) -> FusedDecoder | None:
        """Builds the fused decoder, once, and proves it against the transformers model; None when
        it cannot be (`fusion` says why).

        `generate` does so at its first call. Sibling linears (q, k, v; gate, up) are joined; the
        transformers model stays usable on the joined weights.
        """
        with lock_of(self.model):
            current = self._decoder or self._captured
            # moved or cast meanwhile
            if current is not None and not current.running and not current.fits(self.model):
                self.unfuse()
            if self._fusion == PENDING:
                self._build()

            return self._decoder

    @ordinary_arithmetic()
    def _build(self) -> None:
        from awq.generate import NotFusable, build_decoder

        try:
            self._decoder = build_decoder(self.model, **self._fused)
            self._fusion = _how_far(self._decoder)
        except NotFusable as reason:
            self._fusion = Fusion("unfused", str(reason))
            logger.warning(
                "%s is not fused, generation runs on transformers' own blocks: %s",
                self.path,
                reason,
            )
            if self._wants_capture and self.model.device.type == "cuda":
                self._capture()

    def _capture(self) -> None:
        """transformers' own step as a graph, where that can be."""
        from awq.generate import NotFusable, build_static

        try:
            self._captured = build_static(self.model, self._fused["max_seq_len"])
            self._fusion = Fusion("captured", self._fusion.reason)
        except NotFusable as reason:
            logger.warning("%s: the step is not captured in a CUDA graph: %s", self.path, reason)

    def unfuse(self) -> None:
        """Puts separate siblings back where `fuse` joined them, bit for bit; the next `generate`
        fuses again.

        A running `generate` is waited for. Raises ConfigError when it is this thread's own, as in a
        streamer.
        """
        with lock_of(self.model):
            for decoder in (self._decoder, self._captured):
                if decoder is not None:
                    decoder.restore()
                    self._fusion = PENDING
            self._decoder = self._captured = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, at any time: the decoder is left out, it is built again where the
        copy generates."""
        with lock_of(self.model):
            built = self._decoder is not None or self._captured is not None
            fusion = PENDING if built else self._fusion
            return self.__dict__ | {"_decoder": None, "_captured": None, "_fusion": fusion}
