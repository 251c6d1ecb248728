"""Models that are not fused: transformers' own forward over its static cache, one token's step
captured in a CUDA graph.

It has `FusedDecoder`'s methods, so the same loop runs it. Prompts are pushed to the right here,
because transformers writes every row's token to the same place of the cache; a mask hides what is
left of them. Attention reads the whole cache, which is why this is worth it only where graphs save
the host's time. Layers whose cache would move with a window keep all tokens instead: the mask knows
the window. Recurrent states change in place, those that modules keep as attributes (RecurrentGemma)
after the step. `build_static` proves it against the model's own
forward; what a model says of itself (that it cannot be compiled, say) does not count.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import StaticCache, cache_utils

from awq.errors import ConfigError
from awq.generate.plan import NotFusable
from awq.generate.read.masks import check_cache, read_masks
from awq.generate.read.passes import PIECE
from awq.generate.run.graph import GreedyGraph, StepGraph
from awq.generate.run.greedy import Greedy
from awq.nn.block_calls import cache_argument
from awq.nn.capture import NothingFromTheHost, no_waiting
from awq.nn.copies import copy_structure
from awq.nn.linear import layouts_stay
from awq.nn.places import Places

Captured = TypeVar("Captured", StepGraph, GreedyGraph)
_PROBE = 9  # tokens of the longest prompt of the proof
_TOLERANCE, _ROUGH = 1e-4, 0.03  # of the logits' norm; the second in 16 bits


class StaticDecoder:
    """`prefill` and `step` give logits float32 [batch, vocabulary]. It holds one cache, for the
    batch of the last call."""

    def __init__(self, model: Any, max_seq_len: int, whole_mask: bool = True) -> None:
        """whole_mask: a prompt comes with the mask of the whole cache, as a bias for each of its
        columns wants it; else with that of its tokens, for mixers that take padding out."""
        self.model = model
        self.max_seq_len = max_seq_len
        self.whole_mask = whole_mask
        self.device: torch.device = model.device
        self.dtype = model.dtype
        self.running = False  # inside a call of generate
        taken = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in taken
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        self.cache_name = cache_argument(model.forward)
        self.restore()

    @property
    def counts_padding(self) -> bool:
        """Whether positions include the padding on the left of a row: a model that is not told
        positions counts columns."""
        return not self.takes_positions

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
        self.greedy_graph: GreedyGraph | None = None
        self.places: Places | None = None  # what the graphs read
        self.cache: Any = None
        # (module, attribute, its tensor): states that are not in the cache
        self.own_states: list[tuple[Any, str, Tensor]] = []
        self.mask: Any = None

    def reserve(self, batch: int) -> None:
        """A cache for exactly `batch` rows, which knows nothing of earlier calls."""
        known = self.places is None or self.places.are_of(self.model)
        if self.batch == batch and known:
            self.cache.reset()
            return

        self._forget()  # before the new one is made: both need not fit
        self.cache = _static_cache(self.model.config, self.max_seq_len)
        self.mask = torch.zeros(batch, self.max_seq_len, dtype=torch.long, device=self.device)
        self.padding = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.batch = batch

    @torch.inference_mode()
    def prefill(
        self,
        ids: Tensor,
        lengths: Sequence[int],
        padding: Sequence[int] | None = None,
    ) -> Tensor:
        """The logits of the last token of each prompt.

        ids: int64 [batch, tokens], every row's true tokens first. lengths: how many those are, at
        most max_seq_len. padding: columns before each row's first token, for a model that counts
        them as positions.
        """
        batch = len(ids)
        before_each = padding or [0] * batch
        tokens = max(map(sum, zip(lengths, before_each)))
        if tokens > self.max_seq_len:
            raise ConfigError(
                f"a prompt of {tokens} tokens does not fit max_seq_len={self.max_seq_len}."
            )

        self.reserve(batch)
        before = (tokens - torch.tensor(lengths, device=ids.device)).unsqueeze(1)
        self.padding.copy_(before.squeeze(1))
        place = torch.arange(self.max_seq_len, device=ids.device)
        self.mask.copy_(place >= before)
        positions = (place[:tokens] - before).clamp(min=0)
        mask = self.mask if self.whole_mask else self.mask[:, :tokens]

        attributes = _attributes(self.model)
        logits = self._run(self.pushed(ids, before, tokens), positions, mask)
        self._keep_states(attributes)

        return logits

    def pushed(self, ids: Tensor, padding: Tensor, tokens: int) -> Tensor:
        """Prompts [batch, tokens] with padding in front, as convolutions that no mask stops see
        it; ids have it behind. padding: how many columns, [batch, 1]."""
        columns = torch.arange(tokens, device=ids.device) - padding
        filler = getattr(self.model.generation_config, "pad_token_id", None) or 0
        return torch.where(columns < 0, filler, ids.gather(1, columns.clamp(min=0)))

    def _keep_states(self, before: dict[tuple[Any, str], Tensor]) -> None:
        """What a prompt has put into attributes of modules, in the memory that steps read and
        leave it in."""
        now = _attributes(self.model)
        if not self.own_states:
            self.own_states = [
                (*place, value.clone())
                for place, value in now.items()
                if value is not before.get(place) and len(value) == self.batch
            ]

        for module, name, state in self.own_states:
            state.copy_(now[module, name])
            setattr(module, name, state)

    @torch.inference_mode()
    def step(self, ids: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """The logits after one more token per row; on a GPU overwritten by the next step. As
        `FusedDecoder.step`."""
        if self.device.type != "cuda":
            return self.eager_step(ids, lengths, longest)

        if self.graph is None:
            self.graph = self._captured(
                lambda: StepGraph(self.eager_step, ids, lengths, self.max_seq_len)
            )
        return self.graph(ids, lengths)

    def greedy(self, batch: int) -> Greedy:
        """As `FusedDecoder.greedy`."""
        graph = self.greedy_graph
        return Greedy(batch, self.device) if graph is None else graph.state

    @torch.inference_mode()
    def greedy_step(self, state: Greedy, longest: int) -> None:
        """As `FusedDecoder.greedy_step`."""
        if self.device.type != "cuda":
            state.advance(self.eager_step, longest)
            return

        if self.greedy_graph is None:
            self.greedy_graph = self._captured(
                lambda: GreedyGraph(self.eager_step, state, self.max_seq_len)
            )

        self.greedy_graph()

    def _captured(self, make: Callable[[], Captured]) -> Captured:
        kept = [state.clone() for state in self.states()]
        with layouts_stay():
            if self.places is None or not self.places.are_of(self.model):
                self.graph = self.greedy_graph = None
                self.places = Places(self.model)
            graph = make()
        for state, value in zip(self.states(), kept, strict=True):
            state.copy_(value)  # the step ran before it was captured
        return graph

    def states(self) -> list[Tensor]:
        """What a step changes beside the places of its tokens: states of recurrent mixers."""
        found = []
        for layer in self.cache.layers:
            for held in (vars(layer).get("conv_states"), vars(layer).get("recurrent_states")):
                found += [state for state in (held or {}).values() if state is not None]
        return found + [state for _, _, state in self.own_states]

    def eager_step(self, ids: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """`step` without a CUDA graph: a function of its arguments and the cache, whatever the
        cache counted before."""
        # a row's token stands behind its padding, in the same column for all rows
        place = (lengths + self.padding).max()
        counts = []
        for layer in self.cache.layers:
            for counter in ("cumulative_length", "indexer_cumulative_length"):
                count = getattr(layer, counter, None)
                if count is not None:
                    counts.append(count.copy_(place))

        # On a GPU transformers computes the experts of one token without asking for their numbers;
        # so does its own `generate`.
        experts = getattr(self.model, "_optimize_model_for_decode", nullcontext)
        with NothingFromTheHost(counts, self.max_seq_len), experts():
            logits = self._run(ids.unsqueeze(1), lengths.unsqueeze(1).long(), self.mask)

        for module, name, state in self.own_states:
            state.copy_(getattr(module, name))
            setattr(module, name, state)
        return logits

    def _run(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """ids, positions [batch, tokens], mask [batch, columns] → the logits of the last column."""
        given = {self.cache_name: self.cache, "use_cache": True, **self.last_only}
        if self.takes_positions:
            given["position_ids"] = positions
        out = self.model(input_ids=ids, attention_mask=mask, **given)
        return out.logits[:, -1].float()


def _attributes(model: Any) -> dict[tuple[Any, str], Tensor]:
    """(module, name) → tensor of one axis or more that is neither a parameter nor a buffer."""
    return {
        (module, name): value
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.dim() > 0
    }


def why_not_static(model: Any) -> str | None:
    """Why transformers' static cache cannot serve this model in a captured step, or None."""
    config = model.config
    if config.is_encoder_decoder or config.get_text_config() is not config:
        return "it reads more than one sequence of tokens"
    if len({t.device for t in (*model.parameters(), *model.buffers())}) != 1:
        return "the model is spread over several devices"

    try:
        layers = _static_cache(config, _PROBE).layers
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        return f"transformers has no static cache for it: {error}"

    counters = [vars(layer).get("cumulative_length") for layer in layers]
    if not all(count is None or isinstance(count, Tensor) for count in counters):
        return "this transformers counts the tokens of a static cache on the host"
    if all(count is None for count in counters):
        return "its cache counts no tokens"
    return None


def _static_cache(config: Any, max_seq_len: int) -> Any:
    """transformers' static cache, in which every layer of attention keeps all tokens."""
    cache = StaticCache(config, max_seq_len)
    whole = {
        getattr(cache_utils, f"{prefix}StaticSlidingWindow{name}", None): getattr(
            cache_utils, f"{prefix}Static{whole_name}", None
        )
        for prefix, name, whole_name in (
            ("", "Layer", "Layer"),
            ("LinearAttentionAnd", "AttentionLayer", "FullAttentionLayer"),
        )
    }
    for i, layer in enumerate(cache.layers):
        kind = whole.get(type(layer))
        if kind is not None:
            states = getattr(layer, "number_of_states", None)
            more = {} if states is None else {"number_of_states": states}
            cache.layers[i] = kind(max_cache_len=max_seq_len, **more)

    return cache


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
    if isinstance(known, int) and known > 0:
        max_seq_len = min(max_seq_len, known)
    if max_seq_len < _PROBE + 2:
        raise NotFusable(f"max_seq_len={max_seq_len} is too short to prove it")

    _check_windows(model, max_seq_len)
    try:
        return _proven(StaticDecoder(model, max_seq_len))
    except NotFusable as first:
        try:
            return _proven(StaticDecoder(model, max_seq_len, whole_mask=False))
        except NotFusable:
            raise first from None


def _check_windows(model: Any, max_seq_len: int) -> None:
    """Raises NotFusable unless the mask knows every window that only the cache would keep here."""
    layers = StaticCache(model.config, max_seq_len).layers
    narrow = [
        block
        for block, layer in enumerate(layers)
        if getattr(layer, "is_sliding", False) and layer.get_max_length() < max_seq_len
    ]
    if not narrow:
        return

    ids = _random_ids(model, 1, PIECE)
    masks = read_masks(copy_structure(model), ids, max_seq_len)
    if not all(block in masks for block in narrow):
        raise NotFusable("a sliding window moves the cache, and no mask shows it")
    check_cache(model, masks, max_seq_len)


def _random_ids(model: Any, rows: int, tokens: int) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    first = min(3, vocabulary - 1)
    ids = torch.randint(first, vocabulary, (rows, tokens), generator=generator)
    return ids.to(model.device)


def _proven(decoder: StaticDecoder) -> StaticDecoder:
    """The decoder itself. Raises NotFusable where it differs from the model's own forward."""
    try:
        error = _error(decoder)
    # someone else's forward, which may fail in any way, and more so while it is captured
    except Exception as failure:
        raise NotFusable(
            f"the step cannot run over a static cache: {type(failure).__name__}: {failure}"
        ) from failure
    finally:
        decoder.restore()

    if not error <= (_ROUGH if decoder.dtype.itemsize < 4 else _TOLERANCE):
        raise NotFusable(f"over a static cache the logits differ by {error:.1e}")
    return decoder


def _error(decoder: StaticDecoder) -> float:
    """The largest relative difference to the model's plain forward, row by row: two prompts and two
    steps each."""
    lengths = [_PROBE, _PROBE - 4]
    ids = _random_ids(decoder.model, 2, _PROBE + 2)
    found = [decoder.prefill(ids[:, :-2], lengths)]
    counts = torch.tensor(lengths, dtype=torch.int32, device=ids.device)
    _look_for_waits(decoder, ids[:, -2], counts)

    for step in range(2):
        logits = decoder.step(ids[:, step - 2], counts + step, _PROBE + step)
        found.append(logits.clone())

    expected = _of_transformers(decoder, ids, counts)
    sizes = expected.norm(dim=-1).clamp(min=1e-30)
    difference = torch.stack(found, 1) - expected

    return float((difference.norm(dim=-1) / sizes).max())


def _of_transformers(decoder: StaticDecoder, ids: Tensor, lengths: Tensor) -> Tensor:
    """The logits [rows, 3, vocabulary] of the last prompt token and of two more, as the model's
    plain forward gives them for rows that are padded on the left.

    ids: [rows, tokens], the prompt's first, the two others last. lengths: [rows] of prompts.
    """
    columns = torch.arange(ids.shape[1], device=ids.device)
    padding = _PROBE - lengths.unsqueeze(1).long()
    places = columns - padding  # negative in the padding
    positions = places.clamp(min=0)
    prompts = decoder.pushed(ids[:, :_PROBE], padding, _PROBE)
    whole = torch.cat([prompts, ids[:, _PROBE:]], 1)
    given = {"position_ids": positions} if decoder.takes_positions else {}
    mask = (places >= 0).long()
    out = decoder.model(input_ids=whole, attention_mask=mask, use_cache=False, **given)

    return out.logits[:, -3:].float()


def _look_for_waits(decoder: StaticDecoder, ids: Tensor, lengths: Tensor) -> None:
    """Raises RuntimeError when the step asks the GPU for a number, before a capture fails of it,
    which leaves torch in disorder."""
    if decoder.device.type != "cuda":
        return

    kept = [state.clone() for state in decoder.states()]
    decoder.eager_step(ids, lengths, _PROBE)  # the first run may wait for what it compiles
    with no_waiting():
        decoder.eager_step(ids, lengths, _PROBE)
    for state, value in zip(decoder.states(), kept, strict=True):
        state.copy_(value)
