"""One decode step as a CUDA graph: hundreds of kernels started by one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from awq.generate.run.greedy import Greedy
from awq.nn.capture import capture, on_stream

Step = Callable[[Tensor, Tensor, int], Tensor]


class StepGraph:
    """Replays `step(ids, lengths, longest)` for one batch size. The result is overwritten by the
    next replay.

    The step runs once before it is captured, so that nothing is compiled or allocated inside; with
    the true tokens it only writes to the cache what the first replay writes again.
    """

    def __init__(
        self,
        step: Step,
        ids: Tensor,
        lengths: Tensor,
        max_seq_len: int,
    ) -> None:
        self.ids = ids.clone()
        self.lengths = lengths.clone()
        last = max_seq_len - 1  # shapes inside a graph cannot follow the sequence
        with on_stream(torch.cuda.Stream()):
            step(self.ids, self.lengths, last)

        self.graph, self.logits = capture(lambda: step(self.ids, self.lengths, last))

    def __call__(self, ids: Tensor, lengths: Tensor) -> Tensor:
        self.ids.copy_(ids)
        self.lengths.copy_(lengths)
        self.graph.replay()
        return self.logits


class GreedyGraph:
    """Replays a step and the choice of its tokens, whose place `state` is; nothing is handed over
    between two replays."""

    def __init__(self, step: Step, state: Greedy, max_seq_len: int) -> None:
        self.state = state
        last = max_seq_len - 1
        with on_stream(torch.cuda.Stream()):
            logits = step(state.ids, state.lengths, last)
            Greedy(len(state.ids), logits.device).note(logits)  # compiles what the choice needs
        self.graph, self.logits = capture(lambda: state.advance(step, last))

    def __call__(self) -> None:
        self.graph.replay()
