"""Giving memory back after weights were moved to another layout on a CPU."""

from __future__ import annotations

import ctypes
import sys
from bisect import bisect_right
from pathlib import Path

import torch
from torch import nn

_SUFFIX = ".safetensors"


@torch.no_grad()
def leave_files(model: nn.Module) -> int:
    """Copies every parameter and buffer that still lies in a memory-mapped checkpoint; returns how
    many bytes.

    A file stays mapped, with all pages that were ever read, as long as one tensor of it is in use:
    without this the packed weights of the file stay resident beside those in the kernels' layout.
    Linux only; elsewhere nothing is done.
    """
    ranges, copied = _mapped_files(), 0
    starts = [start for start, _ in ranges]
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None or tensor.device.type != "cpu" or not tensor.numel():
                continue
            index = bisect_right(starts, tensor.data_ptr()) - 1
            if index >= 0 and tensor.data_ptr() < ranges[index][1]:
                tensor.data = tensor.data.clone()
                copied += tensor.nbytes
    return copied


def trim() -> None:
    """Hands free memory of the C library's heap back to the system: it keeps hundreds of MB after
    weights were moved."""
    if sys.platform.startswith("linux"):
        release = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if release is not None:
            release(0)


def _mapped_files() -> list[tuple[int, int]]:
    """[start, stop) of addresses where checkpoints are mapped, ascending."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = [
        line.split(maxsplit=1)[0].split("-") for line in lines if line.rstrip().endswith(_SUFFIX)
    ]
    return sorted((int(start, 16), int(stop, 16)) for start, stop in found)
