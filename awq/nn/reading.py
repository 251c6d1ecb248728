"""Weights that are read past their linear's own forward: no packed linear can stand in where they are computed with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# What a weight may be asked without being computed with.
_ABOUT = {
    Tensor.dtype.__get__, Tensor.device.__get__, Tensor.shape.__get__, Tensor.ndim.__get__, Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    Tensor.is_meta.__get__, Tensor.requires_grad.__get__, Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point,  # type: ignore[attr-defined]
}  # fmt: skip


class _Asked(Tensor):
    """Calls its `used` when something is computed with it."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in _ABOUT:
            values = [v for a in (*args, *(kwargs or {}).values()) for v in (a if isinstance(a, (list, tuple)) else [a])]
            for value in values:
                if isinstance(value, _Asked):
                    value.__dict__["used"]()
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def asked(tensor: Tensor, used: Callable[[], None]) -> Tensor:
    """A view that tells dtype, device and shape, and calls `used` first when it is computed with."""
    seen = tensor.detach().as_subclass(_Asked)
    seen.__dict__["used"] = used
    return seen


@contextmanager
def watched_weights(model: nn.Module, names: Collection[str]) -> Iterator[set[str]]:
    """While open, fills the yielded set with those of the linears `names` whose weight is computed with by someone else.

    As mamba's mixer does with `dt_proj`, and `nn.MultiheadAttention` with `out_proj`. T5 asks its `wo.weight` for its dtype
    only, which packed linears can tell.
    """
    read: set[str] = set()
    undo = []
    for name in names:
        module = model.get_submodule(name)
        if module._parameters.get("weight") is None:
            continue  # a parametrized weight is no parameter
        inside = [0]
        before = module.register_forward_pre_hook(lambda *_, inside=inside: inside.__setitem__(0, inside[0] + 1))
        after = module.register_forward_hook(lambda *_, inside=inside: inside.__setitem__(0, inside[0] - 1), always_call=True)
        undo.append((module, type(module), before, after))
        module.__class__ = _watching(type(module), inside, lambda name=name: read.add(name))
    try:
        yield read
    finally:
        for module, kind, before, after in undo:
            module.__class__ = kind
            before.remove()
            after.remove()


def _watching(kind: type, inside: list[int], note: Any) -> type:
    def weight(self: nn.Module) -> Any:
        found = self._parameters["weight"]
        if inside[0] or found is None:
            return found
        return asked(found, note)

    return type(kind.__name__, (kind,), {"weight": property(weight)})
