"""The next tokens of a greedy call, chosen where the logits are.

Between two steps of a captured model a dozen small operators choose a token, look whether its row
has ended, and count; started one by one they take longer than many a layer. Here they are a part of
the step, so that a CUDA graph holds them, and the host only looks on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from awq.backends import operator
from awq.kernels.cpu.engine import torch_on_one_core

_FEW_SCORES = 1 << 20  # one core looks at them in less time than a step takes
MOST_ENDS = 16  # tokens that end a row; a request with more is served token by token
_NONE = -1  # stands for a token that there is not


def cores_for(scores: Tensor) -> AbstractContextManager:
    """While open, torch looks at scores with as many cores as is worth it."""
    return torch_on_one_core() if scores.numel() <= _FEW_SCORES else nullcontext()


class Greedy:
    """The likeliest token of every row, step by step. Its tensors keep their places.

    ids: int64 [batch], the tokens chosen last, padding for rows that have ended. lengths: int32
    [batch], tokens that are cached. found: int64 [batch + 1], `ids` and whether any row goes on.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        least = torch.iinfo(torch.int64).min

        def numbers(count: int, value: int) -> Tensor:
            return torch.full((count,), value, dtype=torch.int64, device=device)

        self.ids = numbers(batch, 0)
        self.found = numbers(batch + 1, 0)
        self.ends = numbers(MOST_ENDS, _NONE)
        self.padding = numbers(1, _NONE)[0]
        self.scratch = numbers(batch, least)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.going = torch.ones(batch, dtype=torch.bool, device=device)

    def begin(
        self,
        logits: Tensor,
        lengths: Sequence[int],
        ends: Sequence[int] = (),
        padding: int | None = None,
    ) -> None:
        """Chooses the first tokens, from what prompts of `lengths` tokens gave.

        logits: float32 [batch, vocabulary]. ends: tokens after which a row has ended, at most
        `MOST_ENDS`. padding: what a row that has ended gets instead of its likeliest token.
        """
        missing = [_NONE] * (MOST_ENDS - len(ends))
        self.ends.copy_(torch.tensor([*ends, *missing]))
        self.padding.fill_(_NONE if padding is None else padding)
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        self.going.fill_(True)
        self.note(logits)

    def advance(self, step: Callable[[Tensor, Tensor, int], Tensor], longest: int) -> Tensor:
        """One step and the tokens after it; the step's logits. longest: of `lengths`, or more."""
        logits = step(self.ids, self.lengths, longest)
        self.lengths.add_(1)
        with cores_for(logits):
            self.note(logits)

        return logits

    def note(self, logits: Tensor) -> None:
        """Chooses tokens [batch] from logits [batch, vocabulary], in place."""
        choose = operator("choose_token", logits.device, logits.dtype)
        assert choose is not None  # the reference has it
        state = (self.ids, self.going, self.found, self.ends, self.padding, self.scratch)
        choose(logits, *state)


class Rules(NamedTuple):
    """When a greedy call ends. room: new tokens at most. ends: tokens that end a row. padding: what
    such a row gets from then on, None for whatever is likeliest."""

    room: int
    ends: list[int]
    padding: int | None


class Mail:
    """Numbers on their way from the decoder's device to the host, in the order they were sent."""

    def __init__(self, like: Tensor) -> None:
        self.ahead = like.is_cuda
        if self.ahead:
            self.host = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
            self.event = torch.cuda.Event()

    def send(self, numbers: Tensor) -> None:
        """What is sent may be overwritten at once by work that comes after it on its device."""
        if not self.ahead:
            self.here = numbers.clone()
            return
        self.host.copy_(numbers, non_blocking=True)
        self.event.record()

    def take(self) -> Tensor:
        """What was sent last, on the host."""
        if not self.ahead:
            return self.here
        self.event.synchronize()
        return self.host.clone()
