"""Models that are not fused: transformers' own forward over its static cache, one token's step
captured in a CUDA graph.

It has `FusedDecoder`'s methods, so the same loop runs it. Prompts are pushed to the right here,
because transformers writes every row's token to the same place of the cache; a mask hides what is
left of them. Attention reads the whole cache, which is why this is worth it only where graphs save
the host's time. `build_static` proves it against the model's own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from awq.errors import ConfigError
from awq.generate.plan import NotFusable
from awq.generate.run.graph import StepGraph
from awq.nn.capture import NothingFromTheHost, no_waiting

_PROBE = 9  # tokens of the longest prompt of the proof
_TOLERANCE, _ROUGH = 1e-4, 0.03  # of the logits' norm; the second in 16 bits


class StaticDecoder:
    """`prefill` and `step` give logits float32 [batch, vocabulary]. It holds one cache, for the
    batch of the last call."""

    def __init__(self, model: Any, max_seq_len: int) -> None:
        self.model, self.max_seq_len = model, max_seq_len
        self.device: torch.device = model.device
        self.dtype = model.dtype
        self.running = False  # inside a call of generate
        self.counts_padding = False
        self.restore()

    def fits(self, model: Any) -> bool:
        """Whether the model is still where and what it was when this was built."""
        return model.dtype == self.dtype and model.device == self.device

    def release(self, batch: int) -> None:
        """Called after a request; the cache stays for the next one of as many rows."""

    def restore(self) -> None:
        """Gives the cache back; the model was never changed. Raises ConfigError inside a call of
        generate."""
        if self.running:
            raise ConfigError(
                "the model is generating; take it apart (unfuse, cast, move) after generate has "
                "returned."
            )
        self._forget()

    def _forget(self) -> None:
        self.batch = 0
        self.graph: StepGraph | None = None
        self.cache: Any = None
        self.mask: Any = None

    def reserve(self, batch: int) -> None:
        """A cache for exactly `batch` rows, which knows nothing of earlier calls."""
        if self.batch == batch:
            self.cache.reset()
            return
        self._forget()  # before the new one is made: both need not fit
        self.cache = StaticCache(self.model.config, self.max_seq_len)
        self.mask = torch.zeros(batch, self.max_seq_len, dtype=torch.long, device=self.device)
        self.batch = batch

    @torch.inference_mode()
    def prefill(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """The logits of the last token of each prompt.

        ids: int64 [batch, tokens], every row's true tokens first. lengths: how many those are, at
        most max_seq_len.
        """
        batch, tokens = ids.shape
        if tokens > self.max_seq_len:
            raise ConfigError(
                f"a prompt of {tokens} tokens does not fit max_seq_len={self.max_seq_len}."
            )
        self.reserve(batch)
        padding = (tokens - torch.tensor(lengths, device=ids.device)).unsqueeze(1)
        place = torch.arange(self.max_seq_len, device=ids.device)
        self.mask.copy_(place >= padding)
        positions = (place[:tokens] - padding).clamp(min=0)
        return self._run(ids.gather(1, positions), positions)

    @torch.inference_mode()
    def step(self, ids: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """The logits after one more token per row; on a GPU overwritten by the next step. As
        `FusedDecoder.step`."""
        if self.device.type != "cuda":
            return self.eager_step(ids, lengths, longest)
        if self.graph is None:
            self.graph = StepGraph(self.eager_step, ids, lengths, self.max_seq_len)
        return self.graph(ids, lengths)

    def eager_step(self, ids: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """`step` without a CUDA graph: a function of its arguments and the cache, whatever the
        cache counted before."""
        place = lengths.max()
        for layer in self.cache.layers:
            layer.cumulative_length.copy_(place)
        # On a GPU transformers computes the experts of one token without asking for their numbers;
        # so does its own `generate`.
        experts = getattr(self.model, "_optimize_model_for_decode", nullcontext)
        with NothingFromTheHost(), experts():
            return self._run(ids.unsqueeze(1), lengths.unsqueeze(1).long())

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids, positions [batch, tokens] → the logits of the last column."""
        out = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float()


def why_not_static(model: Any) -> str | None:
    """Why transformers' static cache cannot serve this model in a captured step, or None."""
    config = model.config
    if config.is_encoder_decoder or config.get_text_config() is not config:
        return "it reads more than one sequence of tokens"
    if len({t.device for t in (*model.parameters(), *model.buffers())}) != 1:
        return "the model is spread over several devices"
    if not getattr(model, "_can_compile_fullgraph", False):
        return "transformers says that the model cannot be compiled as one graph"
    try:
        layers = StaticCache(config, _PROBE).layers
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        return f"transformers has no static cache for it: {error}"
    if not all(isinstance(getattr(layer, "cumulative_length", None), Tensor) for layer in layers):
        return "this transformers counts the tokens of a static cache on the host"
    if any(getattr(layer, "is_sliding", False) for layer in layers):
        return "a sliding window moves the cache"
    return None


@torch.inference_mode()
def build_static(model: Any, max_seq_len: int) -> StaticDecoder:
    """Proven on random tokens, a step through its graph included. Raises NotFusable with the
    reason.

    The caller holds the model's lock (`awq.nn.locks`): the decoder has one cache.
    """
    reason = why_not_static(model)
    if reason is not None:
        raise NotFusable(reason)
    known = getattr(model.config, "max_position_embeddings", None)
    decoder = StaticDecoder(
        model, min(max_seq_len, known) if isinstance(known, int) and known > 0 else max_seq_len
    )
    if decoder.max_seq_len < _PROBE + 2:
        raise NotFusable(f"max_seq_len={decoder.max_seq_len} is too short to prove it")
    try:
        error = _error(decoder)
    # someone else's forward, which may fail in any way, and more so while it is captured
    except Exception as failure:
        raise NotFusable(
            f"the step cannot run over a static cache: {type(failure).__name__}: {failure}"
        ) from failure
    finally:
        decoder.restore()
    if not error <= (_ROUGH if model.dtype.itemsize < 4 else _TOLERANCE):
        raise NotFusable(f"over a static cache the logits differ by {error:.1e}")
    return decoder


def _error(decoder: StaticDecoder) -> float:
    """The largest relative difference to the model's plain forward, row by row: two prompts and two
    steps each."""
    model, lengths = decoder.model, [_PROBE, _PROBE - 4]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(
        min(3, vocabulary - 1),
        vocabulary,
        (2, _PROBE + 2),
        generator=torch.Generator().manual_seed(0),
    )
    ids = ids.to(decoder.device)
    found = [decoder.prefill(ids[:, :-2], lengths)]
    counts = torch.tensor(lengths, dtype=torch.int32, device=ids.device)
    _look_for_waits(decoder, ids[:, -2], counts)
    for step in range(2):
        token = ids[:, -2 + step]
        found.append(decoder.step(token, counts + step, _PROBE + step).clone())
    worst = 0.0
    for row, length in enumerate(lengths):
        whole = torch.cat([ids[row, :length], ids[row, -2:]]).unsqueeze(0)
        expected = model(input_ids=whole, use_cache=False).logits[0, -3:].float()
        ours = torch.stack([logits[row] for logits in found])
        worst = max(
            worst,
            float(((ours - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)).max()),
        )
    return worst


def _look_for_waits(decoder: StaticDecoder, ids: Tensor, lengths: Tensor) -> None:
    """Raises RuntimeError when the step asks the GPU for a number, before a capture fails of it,
    which leaves torch in disorder."""
    if decoder.device.type != "cuda":
        return
    decoder.eager_step(ids, lengths, _PROBE)  # the first run may wait for what it compiles
    with no_waiting():
        decoder.eager_step(ids, lengths, _PROBE)
