"""Other people's forwards inside CUDA graphs: what they ask of the host, done without or found before a capture fails of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class NothingFromTheHost(TorchFunctionMode):
    """What models write that copies a number from the host, which no capture can, done without: the results are the same.

    `torch.tensor(number, device=gpu)`, as masks are made with, becomes `full`; an index of one number in a list, a slice.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.tensor and len(args) == 1 and isinstance(args[0], (bool, int, float)):
            return torch.full((), *args, **kwargs)
        if function is Tensor.__getitem__ and isinstance(args[1], tuple) and sum(map(_is_list, args[1])) == 1:
            args = (args[0], tuple(_one_wide(i) for i in args[1]))
        return function(*args, **kwargs)


def _is_list(index: Any) -> bool:
    return isinstance(index, (list, Tensor))


def _one_wide(index: Any) -> Any:
    """[i] → i : i + 1; any other index as it is."""
    if isinstance(index, list) and len(index) == 1 and type(index[0]) is int:
        return slice(index[0], index[0] + 1 or None)
    return index


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, whatever makes the host wait for the GPU raises RuntimeError, as far as torch knows of it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
