"""Turns the kernels into machine code for this CPU, and runs them.

llvmlite carries LLVM in its wheel: no compiler, no header and no file is needed on the machine. A
kernel is compiled once per process and dtype, in a few tenths of a second, when it is asked for.

Threads are those of the OpenMP library that torch runs on, so that both share one pool: two pools
that spin take turns of milliseconds. Where torch has none that speaks GNU's interface (macOS,
Windows), Python threads take the parts.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from awq.kernels.cpu.targets import TARGETS, Target
from awq.native.machine import binding, host_machine

_OPENMP = (
    "GOMP_parallel",
    "omp_get_thread_num",
    "omp_get_num_threads",
    "omp_get_max_threads",
    "omp_set_num_threads",
)
_LIBRARIES = ("libgomp", "libiomp5", "libomp")  # their file names begin so
_MAPS = Path("/proc/self/maps")


@cache
def host_target() -> Target | None:
    """How this CPU multiplies bytes; None when it has no instruction for it."""
    features = binding().get_host_cpu_features()
    return next(
        (target for target in TARGETS if all(features.get(name) for name in target.features)), None
    )


@cache
def openmp() -> dict[str, int]:
    """Addresses of the OpenMP functions of the library that this process has loaded; empty when
    there is none."""
    for path in _loaded_openmp():
        try:
            library = ctypes.CDLL(path)
            return {
                name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
                for name in _OPENMP
            }
        except (OSError, AttributeError):
            continue

    return {}


def _loaded_openmp() -> list[str]:
    """Files of the OpenMP libraries in this process, torch's own before other packages' copies."""
    try:
        lines = _MAPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []

    paths = {
        line.split(maxsplit=5)[-1]
        for line in lines
        if any(name in line.rpartition("/")[-1] for name in _LIBRARIES)
    }
    # a folder above all packages may be called torch, too
    own = str(Path(torch.__file__).parent)
    return sorted(paths, key=lambda path: (not path.startswith(own), path))


@contextmanager
def torch_on_one_core() -> Iterator[None]:
    """Operators of torch that the calling thread starts inside run in that thread alone.

    For small ones between kernels: beside a busy process their team would wait for a core for
    milliseconds. Other threads are not touched, nor are the kernels' own teams, which may not be
    started inside.
    """
    functions = openmp()
    if not functions:
        yield
        return

    get = ctypes.CFUNCTYPE(ctypes.c_int)(functions["omp_get_max_threads"])
    set = ctypes.CFUNCTYPE(None, ctypes.c_int)(functions["omp_set_num_threads"])
    before = get()
    set(1)

    try:
        yield
    finally:
        set(before)


def machine_code(module: Any, machine: Any) -> Any:
    """The checked and optimized LLVM module of an `ir.Module`, for a target machine."""
    parsed = binding().parse_assembly(str(module))
    parsed.verify()
    options = binding().create_pipeline_tuning_options(speed_level=3)
    passes = binding().create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)

    return parsed


class Program:
    """A compiled kernel. Calling it with a packed `Task` does the task.

    emit: (llvmlite module, element type, *settings) → the kernel's parts; dtype: of the
    activations; cpu: another CPU than this one, by LLVM's name. Raises what llvmlite raises when it
    cannot compile.
    """

    def __init__(
        self,
        emit: Callable[..., Any],
        dtype: torch.dtype,
        *settings: Any,
        cpu: str | None = None,
    ) -> None:
        b = binding()
        features = None
        addresses = openmp()
        for name, address in addresses.items():
            b.add_symbol(name, address)
        if cpu is None:
            cpu = b.get_host_cpu_name()
            features = b.get_host_cpu_features().flatten()

        target = b.Target.from_default_triple()
        machine = target.create_target_machine(cpu=cpu, features=features or "", opt=3, jit=True)
        module, parts = kernel_module(emit, dtype, settings, bool(addresses))
        code = machine_code(module, machine)
        self._engine = b.create_mcjit_compiler(code, machine)
        self._engine.finalize_object()
        address = self._engine.get_function_address

        if addresses:
            kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
            self._run = _with_state(kind(address("run")))
        else:
            share = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
            functions = [share(address(name)) for name in parts]
            self._run = _in_python_threads(functions)

    def __call__(self, task: bytes) -> None:
        self._run(task)


def object_code(emit: Callable[..., Any], dtype: torch.dtype, *settings: Any) -> bytes:
    """An object file for this CPU with the functions that `emit` makes. Raises what llvmlite
    raises."""
    machine = host_machine()
    module, _ = kernel_module(emit, dtype, settings, openmp=False)
    return machine.emit_object(machine_code(module, machine))


@cache
def program(emit: Callable[..., Any], dtype: torch.dtype, *settings: Any) -> Program:
    """The kernel compiled for this CPU, once in a process."""
    return Program(emit, dtype, *settings)


def kernel_module(
    emit: Callable[..., Any],
    dtype: torch.dtype,
    settings: tuple,
    openmp: bool,
) -> tuple[Any, list[str]]:
    """(the kernel as an `ir.Module`, the names of its parts)."""
    from llvmlite import ir

    from awq.kernels.cpu.ir_types import ELEMENTS
    from awq.kernels.cpu.team import emit_entry

    module = ir.Module("awq")
    parts = emit(module, ELEMENTS[str(dtype).removeprefix("torch.")], *settings)
    if openmp:
        emit_entry(module, parts)

    return module, [part.name for part in parts]


def _with_state(run: Callable[[bytes, int], None]) -> Callable[[bytes], None]:
    state = ctypes.addressof(_team_state())
    return lambda task: run(task, state)


@cache
def _team_state() -> Any:
    """What all kernels of the process know of how quick the team is."""
    from awq.kernels.cpu.team import new_state

    return new_state()


def _in_python_threads(parts: list[Any]) -> Callable[[bytes], None]:
    def run(task: bytes) -> None:
        for part, threads in zip(parts, struct.unpack_from(f"<{len(parts)}q", task)):
            if threads == 1:
                part(task, 0, 1)
                continue

            # ctypes lets go of the interpreter's lock while a part runs
            def share(index: int, part: Any = part, threads: int = threads) -> None:
                part(task, index, threads)

            list(_pool(threads).map(share, range(threads)))

    return run


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "awq")
