"""Modes of torch that a caller's thread may be in, and that must not reach what outlives a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Leaves inference mode, whose tensors nobody may change or train on afterwards; whether
    gradients are noted stays as it is."""
    noted = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(noted):
        yield


@contextmanager
def ordinary_arithmetic() -> Iterator[None]:
    """Leaves autocast, too, which would round what is measured."""
    with ExitStack() as stack:
        stack.enter_context(ordinary_tensors())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
