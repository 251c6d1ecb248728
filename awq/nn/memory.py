"""Memory of this process: giving it back after weights were moved to another layout on a CPU, and
how much of it there is."""

from __future__ import annotations

import ctypes
import sys
from bisect import bisect_right
from itertools import product
from pathlib import Path

import torch
from torch import nn

from awq.native.pool import group_folders

# A group's limit and what it uses with all groups in it, in version 2 and before that; then what
# its memory.stat calls the pages of files, and those among them that are still to be written.
_GROUP_FILES = (
    (
        ("memory.max", "memory.current"),
        ("inactive_file", "active_file"),
        ("file_dirty", "file_writeback"),
    ),
    (
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("total_inactive_file", "total_active_file"),
        ("total_dirty", "total_writeback"),
    ),
)
_SUFFIX = ".safetensors"
_M_MMAP_THRESHOLD = -3  # of malloc.h
MAPPED_BYTES = 4 << 20  # smaller tensors stay in the heap, where they are quick to get


@torch.no_grad()
def leave_files(model: nn.Module) -> int:
    """Copies every parameter and buffer that still lies in a memory-mapped checkpoint; returns how
    many bytes.

    A file stays mapped, with all pages that were ever read, as long as one tensor of it is in use:
    without this the packed weights of the file stay resident beside those in the kernels' layout.
    Linux only; elsewhere nothing is done.
    """
    ranges = _mapped_files()
    copied = 0
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


def return_freed_memory() -> None:
    """From now on the C library hands large tensors back to the system when they are freed.

    By itself it keeps up to 32 MB of each for later, and a process that works on block after block
    grows beyond what it holds.
    """
    if sys.platform.startswith("linux"):
        change = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
        if change is not None:
            change(_M_MMAP_THRESHOLD, MAPPED_BYTES)


def release_cached(device: torch.device) -> None:
    """Hands memory that torch keeps for later tensors back to the GPU.

    Called before tensors that live long are made on a GPU that is nearly full: they would lie
    inside of what large matrices have left, which could then not be used again for their like.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()


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


def resident_memory() -> int:
    """Bytes of this process's memory; 0 where the system does not say."""
    return _kilobytes("/proc/self/status", "VmRSS")


def peak_resident_memory() -> int:
    """The most that `resident_memory` has been since this process started."""
    return _kilobytes("/proc/self/status", "VmHWM")


def available_memory() -> int | None:
    """Bytes that this process may still take: of the machine's memory, of its control group's, and
    of its own address space, whichever ends first. None where the system does not say."""
    limits = [_kilobytes("/proc/meminfo", "MemAvailable"), *_group_limits(), *_own_limit()]
    return min((limit for limit in limits if limit), default=None)


def _kilobytes(path: str, name: str) -> int:
    """A line like "VmRSS: 1024 kB" of a file of /proc, in bytes."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _group_limits() -> list[int]:
    """Bytes that the control groups leave, where they have limits (containers, batch systems)."""
    found = []
    for folder, (files, cached, unwritten) in product(group_folders("memory"), _GROUP_FILES):
        try:
            texts = [(folder / name).read_text() for name in files]
            limit, used = map(int, texts)
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue

        # A group is charged for every page of a file that it has read, and drops them before it
        # refuses memory; a model's files would else count as memory that is gone.
        counts = _statistics(folder / "memory.stat")
        clean = sum(counts.get(name, 0) for name in cached)
        clean -= sum(counts.get(name, 0) for name in unwritten)
        found.append(max(1, limit - used + max(0, clean)))

    return found


def _statistics(path: Path) -> dict[str, int]:
    """A group's lines "name bytes"; empty where there are none to read."""
    try:
        pairs = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
        return {name: int(count) for name, count in pairs}
    except (OSError, ValueError):
        return {}


def _own_limit() -> list[int]:
    """What `ulimit -v` leaves."""
    if sys.platform == "win32":
        return []

    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = _kilobytes("/proc/self/status", "VmSize")

    return [] if limit == resource.RLIM_INFINITY else [max(1, limit - used)]
