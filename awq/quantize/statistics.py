"""Streaming statistics of linear inputs: one Gram matrix and the means of x and |x| per input, never the inputs themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy

import torch
from torch import Tensor, nn

ENOUGH = 4  # tokens per channel that a Gram matrix should stand for
INDEPENDENT = 1 / 9  # imagined tokens for each true one, however many there are: a tenth of the whole
_OWN = 16  # tokens from which a channel's own energy outweighs that of all


class InputStatistics:
    """Sums over tokens of one input. gram: float32 [in, in] = Σ x xᵀ; sum, abs_sum: float32 [in].

    tokens: how many were added; dropped: how many were not finite; imagined: how many `fill` stands for; calls: of the linear.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.gram = torch.zeros(in_features, in_features, device=device)
        self.sum = torch.zeros(in_features, device=device)
        self.abs_sum = torch.zeros(in_features, device=device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # asked for at the end: a GPU would be waited for
        self.imagined = 0
        self.calls = 0

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """x: [..., in]; mask: bool [batch, tokens] of real tokens. Rows that are not finite are dropped and counted."""
        rows = self._kept(x.detach().reshape(-1, x.shape[-1]).float(), mask)
        self.gram.addmm_(rows.t(), rows)
        self.sum += rows.sum(0)
        self.abs_sum += rows.abs().sum(0)
        self.calls += 1

    def _kept(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        """rows [n, any] with zeros in those that do not count; counts the others."""
        finite = keep = rows.isfinite().all(-1)
        if mask is not None and mask.numel() == len(rows):
            keep = finite & mask.reshape(-1)
            finite = finite | ~mask.reshape(-1)
        self._counts += torch.stack([keep.sum(), (~finite).sum()])
        return rows.where(keep.unsqueeze(-1), 0.0)

    @property
    def tokens(self) -> int:
        return int(self._counts[0])

    @property
    def dropped(self) -> int:
        return int(self._counts[1])

    def divided_by(self, scale: Tensor) -> InputStatistics:
        """The statistics of x / scale, as a linear behind a folded scale [in] meets it."""
        found = copy(self)
        found.gram = self.gram / scale / scale.unsqueeze(-1)
        found.sum, found.abs_sum = self.sum / scale, self.abs_sum / scale
        return found

    def fill(self) -> None:
        """Adds what imagined tokens with independent channels would: a share of the true ones, and up to ENOUGH per channel.

        Few tokens leave directions in which no error is seen, and codes chosen for them are far worse than the nearest ones
        on any other text; and any text leaves directions that another one uses. The channels' means and energies come from the
        tokens there are, drawn towards 0 and towards the mean energy when those are few.
        """
        if self.tokens == 0:
            return
        missing = max(self.lacking, round(INDEPENDENT * self.tokens))
        own = self.tokens / (self.tokens + _OWN) if self.lacking else 1.0
        energy, mean = self.gram.diagonal() / self.tokens, own * self.mean
        energy = energy * own + energy.mean() * (1 - own)
        self.gram.addr_(mean, mean, alpha=missing)
        self.gram.diagonal().add_((energy - mean**2).clamp_(min=0), alpha=missing)
        self.sum += missing * mean
        self.imagined = missing

    @property
    def lacking(self) -> int:
        """Tokens that are missing to ENOUGH per channel."""
        return max(0, ENOUGH * len(self.gram) - self.tokens)

    @property
    def mean(self) -> Tensor:
        """Of x, imagined tokens included."""
        return self.sum / max(1, self.tokens + self.imagined)

    @property
    def abs_mean(self) -> Tensor:
        return self.abs_sum / max(1, self.tokens)

    @property
    def centred_gram(self) -> Tensor:
        """Σ (x − mean)(x − mean)ᵀ: what is left of the error when a bias makes up for its mean."""
        gram = torch.addr(self.gram, self.sum, self.sum, alpha=-1 / max(1, self.tokens + self.imagined))
        gram.diagonal().clamp_(min=0)  # a constant channel's difference of two equal numbers
        return gram


class MaskHolder:
    """The token mask of the batch that is running; hooks read it."""

    mask: Tensor | None = None


@contextmanager
def collect_inputs(block: nn.Module, names: Iterable[str], holder: MaskHolder) -> Iterator[dict[str, InputStatistics]]:
    """While open, every forward of `block` adds the inputs of the named linears to the yielded statistics."""
    statistics: dict[str, InputStatistics] = {}
    handles = []

    def hook_for(name: str):
        def hook(_module: nn.Module, args: tuple) -> None:
            x = args[0]
            if name not in statistics:
                statistics[name] = InputStatistics(x.shape[-1], x.device)
            statistics[name].add(x, holder.mask)

        return hook

    for name in names:
        handles.append(block.get_submodule(name).register_forward_pre_hook(hook_for(name)))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
