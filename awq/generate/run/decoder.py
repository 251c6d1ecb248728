"""`FusedDecoder`: prompts in pieces, then one token per row and step, over a cache that was
allocated once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from awq.errors import ConfigError
from awq.generate.plan import DecoderPlan
from awq.generate.run.block import Step
from awq.generate.run.body import FusedBody
from awq.generate.run.cache import LayerCache, MixerStates, allocate
from awq.generate.run.graph import GreedyGraph, StepGraph
from awq.generate.run.greedy import Greedy
from awq.nn.capture import NothingFromTheHost, no_waiting
from awq.nn.linear import layouts_stay
from awq.nn.places import Places
from awq.nn.surgery import get_weight

logger = logging.getLogger("awq.generate")

_NO_GRAPH = "decode steps are not captured as CUDA graphs, and slower for it: %s."
Captured = TypeVar("Captured", StepGraph, GreedyGraph)
KEPT_CALLS = 8  # requests for which a GPU keeps a cache that they do not fill


class FusedDecoder:
    """A `FusedBody` with its cache and its captured steps.

    The weights are those of the transformers model, which keeps working. `prefill` and `step` give
    logits float32 [batch, vocabulary]; the cache of up to `max_seq_len` tokens a row is allocated
    at the first prompt. There is one cache: callers take turns, by `awq.nn.locks.lock_of(model)`.
    """

    def __init__(
        self,
        plan: DecoderPlan,
        model: Any,
        batch_size: int = 1,
        merge: bool = True,
    ) -> None:
        self.plan = plan
        self.model = model
        self.batch_size = batch_size
        self.cache: list[LayerCache] = []
        self.graphs: dict[int, StepGraph] = {}  # by batch
        self.greedy_graphs: dict[int, GreedyGraph] = {}
        self.places: Places | None = None  # what the graphs read
        self.dtype = model.dtype
        self.running = False  # inside a call of generate
        self.recent: deque[int] = deque(maxlen=KEPT_CALLS)  # rows of the last requests
        self.device: torch.device = get_weight(plan.embedding).device
        self.foreign = plan.has_own_code
        self.states: MixerStates | None = None
        self.graphable = self.device.type == "cuda"
        self.body = FusedBody(plan, merge)
        self.linears = list(self.body.linears())

    @property
    def max_seq_len(self) -> int:
        return self.plan.max_seq_len

    @property
    def counts_padding(self) -> bool:
        """Whether positions include the padding on the left of a row."""
        return self.plan.counts_padding

    def fits(self, model: Any) -> bool:
        """Whether the model is still where and what it was when it was fused: others may have put
        adapters on its linears."""
        moved = model.dtype != self.dtype or get_weight(self.plan.embedding).device != self.device
        return not moved and all(
            now is then for now, then in zip(self.body.linears(), self.linears)
        )

    def reserve(self, batch: int) -> None:
        """Room in the cache for `batch` rows; what is there is kept when it is enough already."""
        batch = max(batch, self.batch_size)
        if self.cache and self.cache[0].k.shape[0] >= batch:
            return

        self._forget_cache()  # before the new one is made: both need not fit
        attentions = [p.attention for p in self.plan.blocks]
        self.cache = allocate(
            attentions,
            batch,
            self.max_seq_len,
            self.dtype,
            self.device,
        )
        self.padding = torch.zeros(batch, dtype=torch.long, device=self.device)

    def release(self, batch: int) -> None:
        """Called after a request of `batch` rows: gives memory back that only outsized requests
        need.

        Rows beyond `batch_size` go back at once on a CPU. On a GPU, where the next request of that
        size would capture its step again, they go back when `KEPT_CALLS` requests in a row did
        without them.
        """
        rows = self.cache[0].k.shape[0] if self.cache else 0
        if rows <= self.batch_size:
            return

        self.recent.append(batch)
        unused = len(self.recent) == KEPT_CALLS and max(self.recent) < rows
        if unused or self.device.type != "cuda":
            self._forget_cache()

    def _forget_cache(self) -> None:
        self._forget_graphs()  # they hold the cache's addresses
        self.recent.clear()
        self.cache = []
        self.states = None

    def _forget_graphs(self) -> None:
        self.graphs.clear()
        self.greedy_graphs.clear()
        self.places = None

    def _look(self) -> None:
        """Forgets all graphs when a weight no longer lies where they read it."""
        if self.places is not None and not self.places.are_of(self.model):
            self._forget_graphs()

    def restore(self) -> None:
        """Puts separate siblings back into the transformers model; the decoder is of no use
        afterwards.

        Raises ConfigError inside a call of generate, as from a streamer.
        """
        if self.running:
            raise ConfigError(
                "the model is generating; take it apart (unfuse, cast, move) after generate has "
                "returned."
            )

        self.body.separate()
        self._forget_cache()

    @torch.inference_mode()
    def prefill(
        self,
        ids: Tensor,
        lengths: Sequence[int],
        padding: Sequence[int] | None = None,
    ) -> Tensor:
        """Caches prompts and returns the logits of the last token of each, float32 [batch,
        vocabulary].

        ids: int64 [batch, tokens], every row's true tokens first. lengths: how many those are.
        padding: columns before each row's first token, for a model that counts them as positions.
        Raises ConfigError when a prompt is longer than the cache.
        """
        batch, tokens = ids.shape
        if tokens > self.max_seq_len:
            raise ConfigError(
                f"a prompt of {tokens} tokens does not fit max_seq_len={self.max_seq_len}."
            )

        self._look()
        self.reserve(batch)
        self.padding[:batch] = torch.tensor(padding or [0] * batch, device=ids.device)
        if self.plan.states is None:
            cache = [layer.part(slice(0, batch)) for layer in self.cache]
            return self.body.logits(self.body.last_of(ids, lengths, cache, self.padding[:batch]))

        found = []
        states = []
        for rows in self._rows_at_once(lengths):
            own = self.plan.states()
            length = lengths[rows.start]
            cache = [layer.part(rows, own) for layer in self.cache]
            found.append(
                self.body.last_of(ids[rows, :length], lengths[rows], cache, self.padding[rows])
            )
            states.append(own)

        self._keep(MixerStates.joined(states), batch)
        return self.body.logits(torch.cat(found))

    def _rows_at_once(self, lengths: Sequence[int]) -> list[slice]:
        """Rows that are read together where mixers keep states: all of one length, else one by
        one, for no state may see padding."""
        batch = len(lengths)
        if len(set(lengths)) == 1:
            return [slice(0, batch)]
        return [slice(row, row + 1) for row in range(batch)]

    def _keep(self, states: MixerStates, batch: int) -> None:
        """The states of a new request; at the same addresses where a graph holds the last ones."""
        captured = batch in self.graphs or batch in self.greedy_graphs
        if self.states is not None and captured and self._rows_of_states() == batch:
            self.states.put(states.tensors())

            return

        self._forget_graphs()
        self.states = states

    def _rows_of_states(self) -> int:
        tensors = [] if self.states is None else self.states.tensors()
        return len(tensors[0]) if tensors else 0

    @torch.inference_mode()
    def step(self, ids: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """The logits after one more token per row, float32 [batch, vocabulary]; on a GPU
        overwritten by the next step.

        ids: int64 [batch]; lengths: int32 [batch], tokens cached before. longest: the largest of
        them.
        """
        if self.graphable:
            graph = self.graphs.get(len(ids)) or self._captured(
                self.graphs,
                lambda: StepGraph(self.eager_step, ids, lengths, self.max_seq_len),
                ids,
                lengths,
            )
            if graph is not None:
                return graph(ids, lengths)
            self.graphable = False
        return self.eager_step(ids, lengths, longest)

    def greedy(self, batch: int) -> Greedy:
        """What holds the tokens of a greedy call of `batch` rows, for `greedy_step`."""
        graph = self.greedy_graphs.get(batch)
        return Greedy(batch, self.device) if graph is None else graph.state

    @torch.inference_mode()
    def greedy_step(self, state: Greedy, longest: int) -> None:
        """`step` with the tokens of `state`, and the choice of the next ones."""
        if self.graphable:
            graph = self.greedy_graphs.get(len(state.ids)) or self._captured(
                self.greedy_graphs,
                lambda: GreedyGraph(self.eager_step, state, self.max_seq_len),
                state.ids,
                state.lengths,
            )
            if graph is not None:
                graph()

                return

            self.graphable = False

        state.advance(self.eager_step, longest)

    def _captured(
        self,
        graphs: dict[int, Captured],
        make: Callable[[], Captured],
        ids: Tensor,
        lengths: Tensor,
    ) -> Captured | None:
        """The step as a graph, or None; states are as they were before."""
        kept = None if self.states is None else self.states.keep()
        graph = None
        if self._runs_alone(ids, lengths):
            with layouts_stay():
                self._look()
                self.places = self.places or Places(self.model)
                graph = self._graph_of_step(make)
        if graph is not None:
            graphs[len(ids)] = graph
        if self.states is not None and kept is not None:
            self.states.put(kept)

        return graph

    def _graph_of_step(self, make: Callable[[], Captured]) -> Captured | None:
        try:
            return make()
        except RuntimeError as reason:
            if not self.foreign:
                raise

            # an operator of the model's own code that copies to the host inside, where no trial
            # sees it
            logger.warning(_NO_GRAPH, reason)
            return None

    def _runs_alone(self, ids: Tensor, lengths: Tensor) -> bool:
        """Whether a step never asks the GPU for a number, which no capture can.

        Ours does not. What runs in the model's own code, as the routing of a mixture, is tried.
        """
        if not self.foreign:
            return True

        last = self.max_seq_len - 1
        self.eager_step(ids, lengths, last)  # the first run may wait for what it compiles
        try:
            with no_waiting():
                self.eager_step(ids, lengths, last)
        except RuntimeError as reason:
            logger.warning(_NO_GRAPH, reason)
            return False

        return True

    def eager_step(self, ids: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """`step` without a CUDA graph."""
        cache = [layer.part(slice(0, len(ids)), self.states) for layer in self.cache]
        positions = (lengths + self.padding[: len(ids)]).unsqueeze(1)
        with NothingFromTheHost() if self.foreign else nullcontext(), self._experts_of_a_step():
            hidden = self.body.hidden(ids.unsqueeze(1), positions, cache, Step(lengths, longest))
        return self.body.logits(hidden[:, 0])

    def _experts_of_a_step(self) -> Any:
        """transformers computes dense experts of one token without asking for their numbers inside
        of this; its own `generate` does so on a GPU."""
        if not self.foreign or self.device.type != "cuda":
            return nullcontext()
        return getattr(self.model, "_optimize_model_for_decode", nullcontext)()
