"""The table of backends, and which one serves a linear.

A backend is a module of this folder with three names:

- `LAYOUT`: the layout (`awq.formats.get_layout`) that it computes on; None means any.
- `why_not(device, dtype, shape) -> str | None`: why it cannot serve, or None. It must not fail, and is asked rarely.
- `linear(x [..., in], packed, bias [out] | None) -> [..., out]` in x's dtype. `packed` is in `LAYOUT`.

and, if it can do better than the reference, `dequantize(packed, dtype) -> [out, in]` and `moe_linear` (see `awq.kernels.moe`).
Optional dependencies are imported inside its functions. The first backend of `PREFERENCE` without a reason serves; its layout
is the one that `WQLinear` moves its weights to.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch

from awq.errors import ConfigError
from awq.kernels.packed import Shape

PREFERENCE = ("triton", "cpu", "torch_int4", "reference")
ON_REQUEST = ("cpu_int8",)  # less exact; serve only when forced
VARIABLE = "AWQ_BACKEND"

_forced: ContextVar[str | None] = ContextVar("awq_backend", default=os.environ.get(VARIABLE) or None)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Only this backend serves inside the block (None: the usual choice). The variable `AWQ_BACKEND` does so for a process."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@cache
def get_backend(name: str) -> Any:
    """The module of a backend. Raises ConfigError when there is none of that name."""
    if name not in PREFERENCE + ON_REQUEST:
        raise ConfigError(
            f"backend {name!r} is unknown; use one of {', '.join(PREFERENCE + ON_REQUEST)} (also in the variable {VARIABLE})."
        )
    return importlib.import_module(f"awq.kernels.{name}")


def reasons(device: torch.device, dtype: torch.dtype, shape: Shape) -> dict[str, str | None]:
    """Backend → why it cannot serve this linear on this device with activations of `dtype` (None: it can), best first."""
    return {name: get_backend(name).why_not(device, dtype, shape) for name in PREFERENCE}


def choose(device: torch.device, dtype: torch.dtype, shape: Shape, layout: str | None = None) -> str:
    """The name of the backend that serves; with `layout`, among those that compute on it.

    Raises ConfigError when a forced backend cannot.
    """
    return _choose(device, dtype, shape, layout, _forced.get())


@cache
def _choose(device: torch.device, dtype: torch.dtype, shape: Shape, layout: str | None, forced: str | None) -> str:
    reason = None
    for name in PREFERENCE if forced is None else (forced,):
        backend = get_backend(name)
        if layout is not None and backend.LAYOUT not in (None, layout):
            reason = f"it computes on layout {backend.LAYOUT}, not {layout}"
            continue
        reason = backend.why_not(device, dtype, shape)
        if reason is None:
            return name
    raise ConfigError(f"backend {forced} cannot serve a linear of {shape} on {device} with {dtype}: {reason}.")


def layout_for(device: torch.device, dtype: torch.dtype, shape: Shape) -> str | None:
    """The layout that the backend chosen for this linear computes on; None when it takes any."""
    return get_backend(choose(device, dtype, shape)).LAYOUT


class Explanation(NamedTuple):
    """Which backend serves a linear.

    backend: its name. layout: the layout that the weights have now. others: other backends → why they do not serve.
    """

    backend: str
    layout: str
    others: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend} (weights in layout {self.layout})"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.others.items()])


def explain(module: Any, dtype: torch.dtype = torch.float16) -> Explanation:
    """Which backend serves a `WQLinear` for activations of `dtype` on the device where it is, and why the others do not."""
    device, shape = module.qweight.device, Shape(module.in_features, module.out_features, module.group_size)
    name = choose(device, dtype, shape, module.layout)
    others = {}
    for other, reason in reasons(device, dtype, shape).items():
        if other == name:
            continue
        layout = get_backend(other).LAYOUT
        if reason is None and layout not in (None, module.layout):
            reason = f"the weights are not in its layout {layout} yet; the first forward outside of compilation moves them"
        others[other] = reason or f"{name} comes first"
    return Explanation(name, module.layout, others)
