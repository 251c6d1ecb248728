"""Detects layers whose weight is used without calling the layer, which a packed linear cannot stand
in for.

Most models call their linears. Some compute with `linear.weight` themselves: mamba's mixer does so
with `dt_proj`, and `nn.MultiheadAttention` with `out_proj`. A packed linear has no such weight, so
these layers must stay dense. Other models ask a weight only for its dtype or device (T5 asks its
`wo`), which a packed linear can tell.

`watched_weights` gives every watched linear a weight that notices the difference: a tensor subclass
that answers questions *about* itself (dtype, device, shape) and takes note of any computation
*with* it. The layer's own forward is let through. The packed linear answers `weight` with the same
kind of tensor, `metadata_view`, and raises an error that says what to do when somebody computes
with it after all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# What a weight may be asked without being computed with.
_METADATA = {
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    Tensor.is_meta.__get__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
}


class _MetadataView(Tensor):
    """Calls its `used` when something is computed with it."""

    @classmethod
    def __torch_function__(
        cls,
        function: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function not in _METADATA:
            for value in _flat((*args, *kwargs.values())):
                if isinstance(value, _MetadataView):
                    value.__dict__["used"]()

        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)


def _flat(values: tuple) -> Iterator[Any]:
    """The values, and those in lists and tuples among them (as `torch.cat` takes)."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def metadata_view(tensor: Tensor, used: Callable[[], None]) -> Tensor:
    """A view that tells dtype, device and shape, and calls `used` first when it is computed
    with."""
    view = tensor.detach().as_subclass(_MetadataView)
    view.__dict__["used"] = used
    return view


@contextmanager
def watched_weights(model: nn.Module, names: Collection[str]) -> Iterator[set[str]]:
    """While open, fills the yielded set with those of the linears `names` whose weight somebody
    else computes with."""
    read: set[str] = set()
    watches = []
    try:
        for name in names:
            module = model.get_submodule(name)
            if module._parameters.get("weight") is None:
                continue  # a parametrized weight is no parameter
            watches.append(_Watch(module, partial(read.add, name)))
        yield read
    finally:
        for watch in watches:
            watch.end()


class _Watch:
    """Gives one module a `weight` that notes accesses from outside its own calls, by way of a
    subclass of its class."""

    def __init__(self, module: nn.Module, note: Callable[[], Any]) -> None:
        self.module = module
        self.kind = type(module)
        self.note = note
        self.depth = 0  # of the module's own calls that are running
        watched = {
            "weight": property(lambda _module: self._weight()),
            "__call__": lambda _module, *args, **kwargs: self._call(*args, **kwargs),
        }
        module.__class__ = type(self.kind.__name__, (self.kind,), watched)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        self.depth += 1
        try:
            return self.kind.__call__(self.module, *args, **kwargs)
        finally:
            self.depth -= 1

    def _weight(self) -> Any:
        weight = self.module._parameters["weight"]
        if self.depth or weight is None:
            return weight
        return metadata_view(weight, self.note)

    def end(self) -> None:
        self.module.__class__ = self.kind


@torch.no_grad()
def changed_by_forward(model: Any) -> list[str]:
    """Names of the parameters that a model's own forward changes when it runs for the first time,
    as RWKV's does.

    Asked of an empty model of its class on the meta device; none where there can be no such model.
    """
    versions: dict[str, int] = {}
    fresh: Any = None
    # someone else's class, which may fail in any way
    with suppress(Exception), torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config)).eval()
        versions = {name: parameter._version for name, parameter in fresh.named_parameters()}
        fresh.base_model(input_ids=torch.ones(1, 2, dtype=torch.long))

    if fresh is None:
        return []

    now = dict(fresh.named_parameters())
    return [name for name, version in versions.items() if now[name]._version != version]
