"""The one table of who computes: products, the operators of a decode step, and the searches of the
quantizer.

A backend is a module `awq.kernels.NAME` with these names:

- `LAYOUT`: the layout (`awq.formats.get_layout`) that its products compute on; None means any.
- `why_not(device, dtype, shape) -> str | None`: why it cannot serve, or None. It must not fail, and
is asked rarely.
- `linear(x [..., in], packed, bias [out] | None) -> [..., out]` in x's dtype. `packed` is in
`LAYOUT`.

and, if it can do better than the reference,

- `dequantize(packed, dtype) -> [out, in]`, and `moe_linear` (see `awq.kernels.moe`).
- `OPERATORS`: names of other operators → the module that holds them. What they compute is said, in
  plain torch, by `awq.kernels.reference.decode`; the searches' plain code is in `awq.core`.
  `why_not` is asked about them without a shape (None): whether they run on that device with that
  dtype.

Optional dependencies are imported inside its functions. The first backend of `PREFERENCE` without a
reason serves; its layout is the one that `WQLinear` moves its weights to.

The table is on the ground floor, and reaches the backends by name, so that every room can ask it:
the searches in `core` as well as the decoder. `use_backend("reference")` therefore turns off every
kernel of the package.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from awq.errors import ConfigError

if TYPE_CHECKING:
    from awq.kernels.packed import Shape

PREFERENCE = ("triton", "cpu", "torch_int4", "reference")
ON_REQUEST = ("cpu_int8",)  # less exact; serve only when forced
VARIABLE = "AWQ_BACKEND"

_forced: ContextVar[str | None] = ContextVar(
    "awq_backend", default=os.environ.get(VARIABLE) or None
)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Only this backend serves inside the block (None: the usual choice). The variable
    `AWQ_BACKEND` does so for a process.

    Operators that the backend does not offer, as `torch_int4` has products only, are the
    reference's.

    >>> from awq.kernels.packed import Shape
    >>> with use_backend("reference"):
    ...     choose(torch.device("cpu"), torch.float32, Shape(128, 128, 64))
    'reference'
    """
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
            f"backend {name!r} is unknown; use one of {', '.join(PREFERENCE + ON_REQUEST)} (also "
            f"in the variable {VARIABLE})."
        )
    return importlib.import_module(f"awq.kernels.{name}")


def reasons(device: torch.device, dtype: torch.dtype, shape: Shape) -> dict[str, str | None]:
    """Backend → why it cannot serve this linear on this device with activations of `dtype` (None:
    it can), best first."""
    return {name: get_backend(name).why_not(device, dtype, shape) for name in PREFERENCE}


def choose(
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape,
    layout: str | None = None,
) -> str:
    """The name of the backend that serves a linear; with `layout`, among those that compute on it.

    Raises ConfigError when a forced backend cannot.
    """
    return _choose(device, dtype, shape, layout, _forced.get())


def backend_for(device: torch.device, dtype: torch.dtype, shape: Shape, layout: str) -> Any:
    """The module of the backend that `choose` names."""
    return _backend(device, dtype, shape, layout, _forced.get())


def operator(name: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
    """What computes an operator other than a product there; None where only the caller's plain code
    does."""
    return _operator(name, device, dtype, _forced.get())


@cache
def _choose(
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape,
    layout: str | None,
    forced: str | None,
) -> str:
    reason = None
    for name in PREFERENCE if forced is None else (forced,):
        backend = get_backend(name)
        if layout is not None and backend.LAYOUT not in (None, layout):
            reason = f"it computes on layout {backend.LAYOUT}, not {layout}"
            continue

        reason = backend.why_not(device, dtype, shape)
        if reason is None:
            return name

    raise ConfigError(
        f"backend {forced} cannot serve a linear of {shape} on {device} with {dtype}: {reason}."
    )


@cache
def _backend(
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape,
    layout: str,
    forced: str | None,
) -> Any:
    return get_backend(_choose(device, dtype, shape, layout, forced))


@cache
def _operator(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    forced: str | None,
) -> Callable[..., Any] | None:
    for candidate in PREFERENCE if forced is None else (forced, "reference"):
        backend = get_backend(candidate)
        home = getattr(backend, "OPERATORS", {}).get(name)
        if home is not None and backend.why_not(device, dtype, None) is None:
            return getattr(importlib.import_module(home), name)
    return None


def forget() -> None:
    """Drops what was chosen before: for tests that change the table."""
    for cached in (_choose, _backend, _operator):
        cached.cache_clear()


def layout_for(device: torch.device, dtype: torch.dtype, shape: Shape) -> str | None:
    """The layout that the backend chosen for this linear computes on; None when it takes any."""
    return get_backend(choose(device, dtype, shape)).LAYOUT


class Explanation(NamedTuple):
    """Which backend serves a linear.

    backend: its name. layout: the layout that the weights have now. others: other backends → why
    they do not serve.
    """

    backend: str
    layout: str
    others: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend} (weights in layout {self.layout})"]
        return "\n".join(
            lines + [f"  not {name}: {reason}" for name, reason in self.others.items()]
        )


def explain(module: Any, dtype: torch.dtype = torch.float16) -> Explanation:
    """Which backend serves a `WQLinear` for activations of `dtype` on the device where it is, and
    why the others do not."""
    device = module.qweight.device
    shape = module.packed.shape
    name = choose(device, dtype, shape, module.layout)

    others = {}
    for other, reason in reasons(device, dtype, shape).items():
        if other == name:
            continue

        layout = get_backend(other).LAYOUT
        if reason is None and layout not in (None, module.layout):
            reason = (
                f"the weights are not in its layout {layout} yet; the first forward outside "
                "of compilation moves them"
            )

        others[other] = reason or f"{name} comes first"

    return Explanation(name, module.layout, others)
