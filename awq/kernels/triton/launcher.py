"""How every Triton kernel is started: on its device, with the options of its GPU, and with little
host time.

A decode step starts hundreds of kernels, so host time counts. Triton's own launch looks at the type
and value of every argument each time, at a cost of tens of microseconds. A `Launcher` calls what
Triton compiled directly from the second time on. `launch` goes through Triton each time: for the
searches of the quantizer, whose kernels run for milliseconds.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

ARENA_COUNTERS = 1 << 20  # kept for CUDA graphs
MIN_COUNTERS = 8192  # of one stream
# said outright: releases of Triton differ in what they do unasked
FUSED_MULTIPLY_ADD = {"enable_fp_fusion": True}
POINTER_ALIGNMENT = 16  # bytes; Triton compiles other code for pointers that are not aligned so


@cache
def architecture(index: int | None) -> tuple[str, int]:
    """("sm90" | "gfx942" …, multiprocessors) of a GPU; the interpreter stands for a small one."""
    if index is None:
        return "interpreter", 4

    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm{properties.major}{properties.minor}", properties.multi_processor_count


@cache
def has_assembly(index: int | None) -> bool:
    """Whether kernels may hold NVIDIA's inline assembly."""
    return index is not None and torch.version.hip is None


@cache
def has_dependent_launch(index: int | None) -> bool:
    """Whether a kernel may start before the one in front of it has ended (compute capability 9.0
    and up)."""
    return has_assembly(index) and torch.cuda.get_device_capability(index) >= (9, 0)


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


_NOTHING = _Nothing()


def on_device(device: torch.device) -> Any:
    """Makes `device` the current one, if it is not yet."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _NOTHING
    return torch.cuda.device(device)


def current_stream(index: Any) -> int:
    """The address of the current stream, as Inductor's code asks for it; a `Stream` object costs
    microseconds."""
    return torch._C._cuda_getCurrentRawStream(index)


class Launcher:
    """A kernel with its compile-time constants, on one GPU and for one set of dtypes.

    constants: the kernel's last arguments. options: of its compilation (num_warps …). The caller
    keeps one for each set of dtypes and constants, since those are what Triton compiles for;
    integers among the arguments must not be specialized.
    """

    def __init__(self, kernel: Any, index: int | None, constants: tuple, **options: Any) -> None:
        self.kernel = kernel
        self.index = index
        self.constants = constants

        self.options = options | FUSED_MULTIPLY_ADD
        if has_dependent_launch(index):
            self.options["launch_pdl"] = True

        self.compiled: Any = None

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor, ...],
        *numbers: float,
    ) -> None:
        """Starts the kernel on the current device and stream. numbers: the arguments between
        tensors and constants."""
        aligned = self.index is not None and not any(
            t.data_ptr() % POINTER_ALIGNMENT for t in tensors
        )
        if self.compiled is not None and aligned:
            self.compiled[grid](
                *tensors, *numbers, *self.constants, stream=current_stream(self.index)
            )
            return

        compiled = self.kernel[grid](*tensors, *numbers, *self.constants, **self.options)
        if aligned:
            self.compiled = compiled


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    *arguments: Any,
    **constants_and_options: Any,
) -> None:
    """Starts a kernel through Triton's own launch, on `device`."""
    with on_device(device):
        kernel[grid](*arguments, **constants_and_options, **FUSED_MULTIPLY_ADD)


class Counters:
    """Zeroed int32 counters that kernels leave zeroed.

    Kernels that run at the same time must not share them. Eager calls take those of their stream,
    whose kernels run one after the other. Each call in a CUDA graph gets its own, for graphs may be
    replayed on any stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.used = 0
        self.streams: dict[int, Tensor] = {}
        self.arenas: list[Tensor] = []  # all of them are kept, for graphs hold their addresses

    def take(self, count: int) -> Tensor:
        """At least `count` counters for the current stream."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return self._take_for_graph(count)

        self._prepare_for_graphs()
        stream = current_stream(self.device.index) if self.device.type == "cuda" else 0
        own = self.streams.get(stream)
        if own is None or own.numel() < count:
            own = self.streams[stream] = self._zeros(max(count, MIN_COUNTERS))

        return own

    def _take_for_graph(self, count: int) -> Tensor:
        if not self.arenas or self.used + count > ARENA_COUNTERS:
            return self._zeros(count)  # correct, with a memset in the graph
        self.used += count
        return self.arenas[-1][self.used - count : self.used]

    def _prepare_for_graphs(self) -> None:
        """A new arena when less than half of the last one is left, since none can be made during a
        capture."""
        if self.arenas and self.used <= ARENA_COUNTERS // 2:
            return

        self.arenas.append(self._zeros(ARENA_COUNTERS))
        self.used = 0
        if self.device.type == "cuda":
            # graphs may run on other streams; this happens once
            torch.cuda.current_stream(self.device).synchronize()

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self.device)


@cache
def counters(device: torch.device) -> Counters:
    return Counters(device)
