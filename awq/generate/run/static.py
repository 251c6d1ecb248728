"""Models that are not fused: transformers' own forward over its static cache, one token's step
captured in a CUDA graph.

It has `FusedDecoder`'s methods, so the same loop runs it. Prompts are pushed to the right here,
because transformers writes every row's token to the same place of the cache; a mask hides what is
left of them. Attention reads the whole cache, which is why this is worth it only where graphs save
the host's time. Layers whose cache would move with a window keep all tokens instead: the mask knows
the window. Recurrent states change in place, those that modules keep as attributes (RecurrentGemma)
after the step. `prove_static.build_static` proves it against the model's own forward; what a model
says of itself (that it cannot be compiled, say) does not count.
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
from awq.generate.run.graph import GreedyGraph, StepGraph
from awq.generate.run.greedy import Greedy
from awq.nn.block_calls import cache_argument
from awq.nn.capture import NothingFromTheHost
from awq.nn.linear import layouts_stay
from awq.nn.places import Places

Captured = TypeVar("Captured", StepGraph, GreedyGraph)


class StaticDecoder:
    """`prefill` and `step` give logits float32 [batch, vocabulary]. It holds one cache, for the
    batch of the last call."""

    caching: dict[str, bool] = {"use_cache": True}  # what makes a forward hand out its cache

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
        self.before = 0  # columns of padding that all rows have
        self._drop_graphs()
        self.places: Places | None = None  # what the graphs read
        self.cache: Any = None

        # (module, attribute, its tensor): states that are not in the cache
        self.own_states: list[tuple[Any, str, Tensor]] = []
        self.mask: Any = None

    def _drop_graphs(self) -> None:
        # by the number of columns that they look at
        self.graphs: dict[int, StepGraph] = {}
        self.greedy_graphs: dict[int, GreedyGraph] = {}

    def reserve(self, batch: int) -> None:
        """A cache for exactly `batch` rows, which knows nothing of earlier calls."""
        known = self.places is None or self.places.are_of(self.model)
        if self.batch == batch and known:
            self.begin_anew()
            return

        self._forget()  # before the new one is made: both need not fit
        self.mask = torch.zeros(batch, self.max_seq_len, dtype=torch.long, device=self.device)
        self.padding = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.make_cache()
        self.batch = batch

    def make_cache(self) -> None:
        """Where a cache of the batch comes from."""
        self.cache = static_cache(self.model.config, self.max_seq_len)

    def begin_anew(self) -> None:
        """The cache, kept for as many rows, forgets the last request."""
        self.cache.reset()

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
        self.before = tokens - max(lengths)
        before = (tokens - torch.tensor(lengths, device=ids.device)).unsqueeze(1)
        self.padding.copy_(before.squeeze(1))
        place = torch.arange(self.max_seq_len, device=ids.device)
        self.mask.copy_(place >= before)
        positions = (place[:tokens] - before).clamp(min=0)

        attributes = _attributes(self.model)
        logits = self.read_prompt(self.pushed(ids, before, tokens), positions)
        self._keep_states(attributes)

        return logits

    def read_prompt(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The logits of the last column; ids, positions [batch, tokens]."""
        mask = self.mask if self.whole_mask else self.mask[:, : ids.shape[1]]
        out = self.call(ids, positions, mask, self.cache)
        return self.last_of(out)

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

        columns = self.columns_for(longest)
        graph = self.graphs.get(columns)
        if graph is None:
            step = self._step_over(columns)
            graph = self._captured(lambda: StepGraph(step, ids, lengths, self.max_seq_len))
            self.graphs[columns] = graph
        return graph(ids, lengths)

    def greedy(self, batch: int) -> Greedy:
        """As `FusedDecoder.greedy`."""
        for graph in self.greedy_graphs.values():
            return graph.state  # which all of them share
        return Greedy(batch, self.device)

    @torch.inference_mode()
    def greedy_step(self, state: Greedy, longest: int) -> None:
        """As `FusedDecoder.greedy_step`."""
        if self.device.type != "cuda":
            state.advance(self.eager_step, longest)
            return

        columns = self.columns_for(longest)
        graph = self.greedy_graphs.get(columns)
        if graph is None:
            step = self._step_over(columns)
            graph = self._captured(lambda: GreedyGraph(step, state, self.max_seq_len))
            self.greedy_graphs[columns] = graph

        graph()

    def columns_for(self, longest: int) -> int:
        """How many columns a step looks at whose longest row had as many tokens before."""
        return self.max_seq_len

    def _step_over(self, columns: int) -> Callable[[Tensor, Tensor, int], Tensor]:
        return lambda ids, lengths, _: self.step_over(columns, ids, lengths)

    def _captured(self, make: Callable[[], Captured]) -> Captured:
        kept = [state.clone() for state in self.states()]
        with layouts_stay():
            if self.places is None or not self.places.are_of(self.model):
                self._drop_graphs()
                self.places = Places(self.model)
            graph = make()

        for state, value in zip(self.states(), kept, strict=True):
            state.copy_(value)  # the step ran before it was captured
        return graph

    def states(self) -> list[Tensor]:
        """What a step changes beside the places of its tokens: states of recurrent mixers."""
        found = []
        for layer in getattr(self.cache, "layers", ()):
            for held in (vars(layer).get("conv_states"), vars(layer).get("recurrent_states")):
                found += [state for state in (held or {}).values() if state is not None]
        return found + [state for _, _, state in self.own_states]

    def eager_step(self, ids: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """`step` without a CUDA graph: a function of its arguments and the cache, whatever the
        cache counted before."""
        return self.step_over(self.columns_for(longest), ids, lengths)

    def step_over(self, columns: int, ids: Tensor, lengths: Tensor) -> Tensor:
        """A step over the first `columns` of the cache, which hold at least one token more than
        there are."""
        # a row's token stands behind its padding, in the same column for all rows
        place = (lengths + self.padding).max()
        counts = [count.copy_(place) for count in counts_of(self.cache)]

        # On a GPU transformers computes the experts of one token without asking for their numbers;
        # so does its own `generate`.
        experts = getattr(self.model, "_optimize_model_for_decode", nullcontext)
        with NothingFromTheHost(counts, self.max_seq_len), experts():
            out = self.call(ids.unsqueeze(1), lengths.unsqueeze(1).long(), self.mask, self.cache)

        for module, name, state in self.own_states:
            state.copy_(getattr(module, name))
            setattr(module, name, state)

        return self.last_of(out)

    def call(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: Any, **given: Any) -> Any:
        """The model's own output. ids, positions [batch, tokens], mask [batch, columns]; cache:
        None where there is none yet."""
        given = self.caching | self.last_only | given
        if cache is not None:
            given[self.cache_name] = cache
        if self.takes_positions:
            given["position_ids"] = positions
        return self.model(input_ids=ids, attention_mask=mask, **given)

    def last_of(self, out: Any) -> Tensor:
        """Logits float32 [batch, vocabulary] of the last column."""
        return out.logits[:, -1].float()


def _attributes(model: Any) -> dict[tuple[Any, str], Tensor]:
    """(module, name) → tensor of one axis or more that is neither a parameter nor a buffer."""
    return {
        (module, name): value
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.dim() > 0
    }


class _Cache(StaticCache):
    """Hands out copies of its counts: a number that a model has asked for stays what it was when
    the next token is added (Inkling asks before and computes with it after)."""

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        count = super().get_seq_length(layer_idx)
        return count + 0 if isinstance(count, Tensor) else count


def counts_of(cache: Any) -> list[Tensor]:
    """The numbers of tokens that a static cache holds, int64 [] each."""
    counts = [
        getattr(layer, counter, None)
        for layer in getattr(cache, "layers", ())
        for counter in ("cumulative_length", "indexer_cumulative_length")
    ]
    return [count for count in counts if count is not None]


def static_cache(config: Any, max_seq_len: int) -> Any:
    """transformers' static cache, in which every layer of attention keeps all tokens."""
    cache = _Cache(config, max_seq_len)
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
