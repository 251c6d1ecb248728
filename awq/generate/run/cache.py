"""The key/value cache: allocated once, rows without padding, so that a token's place is its
position. Beside it, the states of mixers that keep some of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from awq.generate.plan import Attention, NotFusable


@dataclass
class LayerCache:
    """k [batch, kv_heads, positions, head_dim], v [batch, kv_heads, positions, value_dim]; both
    empty where a block has no attention. states: of all mixers of the model, or None."""

    k: Tensor
    v: Tensor
    states: MixerStates | None = None

    def until(self, stop: int) -> LayerCache:
        """The first positions, as a view."""
        return LayerCache(self.k[:, :, :stop], self.v[:, :, :stop])

    def part(self, rows: slice, states: MixerStates | None = None) -> LayerCache:
        """Some rows, as a view, with the states of these rows."""
        if rows.start == 0 and rows.stop == len(self.k):  # most steps: two views less per layer
            return LayerCache(self.k, self.v, states)
        return LayerCache(self.k[rows], self.v[rows], states)


def allocate(
    layers: Sequence[Attention | None],
    batch: int,
    positions: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[LayerCache]:
    """One cache for each attention; kv_heads · (head_dim + value_dim) · batch · positions numbers
    of `dtype` per layer."""

    def empty(heads: int, channels: int) -> Tensor:
        return torch.zeros((batch, heads, positions, channels), dtype=dtype, device=device)

    return [
        LayerCache(empty(0, 0), empty(0, 0))
        if a is None
        else LayerCache(empty(a.kv_heads, a.head_dim), empty(a.kv_heads, a.value_head))
        for a in layers
    ]


class MixerStates(DynamicCache):
    """transformers' cache as modules in the model's own code know it: it holds the states of
    recurrent mixers and convolutions, while keys and values pass through to our own cache.

    Its layers change their tensors in place, so a CUDA graph may hold them.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """The keys and values themselves."""
        return key_states, value_states

    @property
    def empty(self) -> bool:
        """Whether no module keeps anything here."""
        return not any(True for _ in self._slots())

    def _slots(self) -> Iterator[tuple[dict, Any, Tensor]]:
        """(dictionary, key, tensor [batch, …]) for every state."""
        for layer in self.layers:
            held = vars(layer)
            for owner in (held, *(value for value in held.values() if isinstance(value, dict))):
                for key, value in owner.items():
                    if isinstance(value, Tensor) and value.dim() > 1:
                        yield owner, key, value

    def tensors(self) -> list[Tensor]:
        """All states, in a fixed order."""
        return [tensor for _, _, tensor in self._slots()]

    def keep(self) -> list[Tensor]:
        """A copy of the states, for `put`."""
        return [tensor.clone() for tensor in self.tensors()]

    def put(self, values: Sequence[Tensor]) -> None:
        """Writes states in place."""
        for tensor, value in zip(self.tensors(), values, strict=True):
            tensor.copy_(value)

    @staticmethod
    def joined(rows: Sequence[MixerStates]) -> MixerStates:
        """The states of several rows as those of one batch; the first one's object."""
        parts = zip(*(states.tensors() for states in rows))
        whole = [torch.cat(part) for part in parts]
        for (owner, key, _), tensor in zip(list(rows[0]._slots()), whole):
            owner[key] = tensor
        return rows[0]


def new_states(config: Any) -> MixerStates:
    """Empty states for a model of `config`. Raises NotFusable where transformers' cache knows
    nothing of configs, as before 4.56."""
    try:
        return MixerStates(config=config)
    except TypeError as error:
        raise NotFusable("this release of transformers has no cache for its mixers") from error
