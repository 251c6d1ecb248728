"""Recognizing channels by their values: which outputs of the linears a tensor deeper in the block
consists of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def flat(x: Tensor) -> Tensor:
    """[batch, tokens, channels] → [batch·tokens, channels]."""
    return x.reshape(-1, x.shape[-1])


def heads_last(x: Tensor) -> Tensor:
    """[batch, heads, tokens, head_dim] → [batch, tokens, heads·head_dim]."""
    return x.transpose(1, 2).flatten(2)


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same order, whatever their axes."""
    return torch.equal(a.reshape(-1), b.reshape(-1))


def find_channels(wanted: Tensor, sources: Sequence[Tensor]) -> Tensor | None:
    """For each channel of wanted [n, c] its place among the channels of the sources [n, …], side by
    side; bit for bit.

    None when a channel is not among them, or two are the same place (then their values say too
    little).
    """
    if not sources:
        return None

    pool = torch.cat(list(sources), 1)
    if pool.shape[0] != wanted.shape[0]:
        return None

    known, order = _fingerprints(pool).sort()
    place = order[torch.searchsorted(known, _fingerprints(wanted)).clamp(max=len(known) - 1)]
    if not torch.equal(pool[:, place], wanted) or len(place.unique()) != len(place):
        return None
    return place


def owners(places: Tensor, widths: Sequence[int]) -> tuple[list[int], Tensor]:
    """Which of sources of `widths` channels the places fall into, and the places counted among the
    channels of those alone."""
    ends = torch.tensor(list(widths), device=places.device).cumsum(0)
    owner = torch.searchsorted(ends, places, right=True)
    used = owner.unique().tolist()
    shift = torch.zeros(len(widths), dtype=torch.long, device=places.device)

    before = 0
    for i in used:
        shift[i] = before - (int(ends[i]) - widths[i])
        before += widths[i]

    return used, places + shift[owner]


def _fingerprints(x: Tensor) -> Tensor:
    """int64 [channels] of the bits of float32 columns; overflow wraps around, which is as good as
    any other hash."""
    bits = (x.float() + 0.0).view(torch.int32).long()  # −0 and 0 are the same value
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, (len(x), 1), generator=generator).to(x.device) | 1
    return (bits * odd).sum(0)
