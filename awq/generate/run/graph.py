"""One decode step as a CUDA graph: hundreds of kernels started by one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from awq.nn.capture import capture, on_stream


class StepGraph:
    """Replays `step(ids, lengths, longest)` for one batch size. The result is overwritten by the
    next replay.

    The step runs once before it is captured, so that nothing is compiled or allocated inside; with
    the true tokens it only writes to the cache what the first replay writes again.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor, int], Tensor],
        ids: Tensor,
        lengths: Tensor,
        max_seq_len: int,
    ) -> None:
        self.ids, self.lengths = ids.clone(), lengths.clone()
        last = max_seq_len - 1  # shapes inside a graph cannot follow the sequence
        with on_stream(torch.cuda.Stream()):
            step(self.ids, self.lengths, last)
        self.graph, self.logits = capture(lambda: step(self.ids, self.lengths, last))

    def __call__(self, ids: Tensor, lengths: Tensor) -> Tensor:
        self.ids.copy_(ids)
        self.lengths.copy_(lengths)
        self.graph.replay()
        return self.logits
