"""Models whose cache is a class of their own (xLSTM, MiniMax, RWKV), their step in a CUDA graph.

The model's forward makes the cache of a prompt, as in transformers' loop. A graph reads and writes
fixed places, so the tensors in that cache stay where those of the first prompt lay: layers that
would grow with every token become static ones, and states that a step makes anew are copied back.
Whatever else the cache holds, a count on the host say, must be the same after a step. The proof of
`prove_static` decides, as for transformers' own static cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import cache_utils

from awq.generate.plan import NotFusable
from awq.generate.run.static import StaticDecoder, counts_of

# younger than transformers 4.51, whose caches have no layers
DynamicLayer: Any = getattr(cache_utils, "DynamicLayer", None)
StaticLayer: Any = getattr(cache_utils, "StaticLayer", ())

_PLAIN = (int, float, str, bool, type(None))


class OwnCacheDecoder(StaticDecoder):
    """As `StaticDecoder`, over what the model's own forward hands out as its cache."""

    def make_cache(self) -> None:
        self.cache = None

    def begin_anew(self) -> None:
        """The next prompt's states take the places of the last one's."""

    def read_prompt(self, ids: Tensor, positions: Tensor) -> Tensor:
        mask = self.mask[:, : ids.shape[1]]
        out = self.call(ids, positions, mask, None)
        self.cache_name = _name_of_cache(self.model, out)
        made = with_room(out[self.cache_name], self.max_seq_len)

        if self.cache is None:
            self.cache = made
        else:
            _take_over(self.cache, made)
        return self.last_of(out)

    def states(self) -> list[Tensor]:
        """All tensors of the cache but the counts, which a step sets, and the keys and values,
        of which it writes one place."""
        apart = {id(count) for count in counts_of(self.cache)}
        for layer in _static_layers(self.cache):
            apart |= {id(layer.keys), id(layer.values)}
        return [tensor for _, _, tensor in held_in(self.cache) if id(tensor) not in apart]

    def step_over(self, columns: int, ids: Tensor, lengths: Tensor) -> Tensor:
        places = list(held_in(self.cache))
        told = list(plain_in(self.cache))
        logits = super().step_over(columns, ids, lengths)

        if list(plain_in(self.cache)) != told:
            raise NotFusable("its own cache counts on the host")
        for (holder, key, now), (_, _, place) in zip(held_in(self.cache), places, strict=True):
            if now is not place:
                _copy(place, now)
                _put(holder, key, place)
        return logits


def _name_of_cache(model: Any, out: Any) -> str:
    """What the model's forward hands out and takes again."""
    taken = inspect.signature(model.forward).parameters
    names = [name for name, value in out.items() if name in taken and not _is_result(value)]
    if len(names) != 1:
        raise NotFusable("its forward hands out no cache")
    return names[0]


def _is_result(value: Any) -> bool:
    return value is None or isinstance(value, Tensor)


def with_room(cache: Any, max_seq_len: int) -> Any:
    """The cache itself, in which layers that would grow are static ones of the same contents."""
    layers = getattr(cache, "layers", None) or []
    grown = [layer for layer in layers if type(layer) is DynamicLayer]
    static: dict[int, Any] = {}
    for layer in grown:
        if layer.keys is not None and layer.values is not None:
            static[id(layer)] = StaticLayer(max_seq_len)
            static[id(layer)].update(layer.keys, layer.values)

    # One that no block writes to is asked for the number of tokens all the same.
    first = next(iter(static.values()), None)
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            layers[i] = static.get(id(layer), first)
    return cache


def _static_layers(cache: Any) -> list[Any]:
    return [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, StaticLayer)]


def held_in(value: Any) -> Iterator[tuple[Any, Any, Tensor]]:
    """(holder, key or attribute, tensor) of every tensor in lists, dicts and objects."""
    for holder, key, item in _leaves(value, set()):
        if isinstance(item, Tensor):
            yield holder, key, item


def plain_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """(key or attribute, number or word) of what else is there."""
    for _, key, item in _leaves(value, set()):
        if isinstance(item, _PLAIN):
            yield key, item


def _leaves(value: Any, seen: set[int]) -> Iterator[tuple[Any, Any, Any]]:
    if id(value) in seen or isinstance(value, (nn.Module, type)) or hasattr(value, "to_dict"):
        return
    seen.add(id(value))

    if isinstance(value, (list, tuple)):
        items: Any = enumerate(value)
    else:
        items = (value if isinstance(value, dict) else getattr(value, "__dict__", {})).items()
    for key, item in list(items):
        if isinstance(item, (Tensor, *_PLAIN)):
            yield value, key, item
        else:
            yield from _leaves(item, seen)


def _put(holder: Any, key: Any, tensor: Tensor) -> None:
    if isinstance(holder, tuple):
        raise NotFusable("its own cache holds new states in tuples")
    if isinstance(holder, (list, dict)):
        holder[key] = tensor
    else:
        setattr(holder, key, tensor)


def _take_over(cache: Any, made: Any) -> None:
    for (_, _, place), (_, _, now) in zip(held_in(cache), held_in(made), strict=True):
        _copy(place, now)


def _copy(place: Tensor, now: Tensor) -> None:
    if place.shape != now.shape:
        raise NotFusable("its own cache grows with the tokens")
    place.copy_(now)
