r"""What this CPU could do at most: the share of it that a figure reaches says more than the figure.

    python benchmarks/roofline.py

Loops of one instruction that this package's own generator emits, on as many threads as there are
cores, and a sum over memory that no cache holds. The shortest of some runs counts, so a neighbour
on the same machine shows as a share above what seems possible, not below. `floor_ms` is the time
that a shape cannot go below: its multiply-adds at the measured rate, or its bytes at the measured
bandwidth, whichever takes longer.
"""

from __future__ import annotations

import ctypes
import json
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

SUMS = 16  # independent ones, so that no instruction waits for the one before
TURNS = 200_000
RUNS = 12
READ_BYTES = 1 << 29


class Machine(NamedTuple):
    """threads: that were measured together. Rates are of all of them: 10⁹ multiply-adds a second of
    bytes and of bfloat16 (None where there is no such instruction), 10⁹ bytes a second."""

    threads: int
    byte_products: float | None
    bfloat16_products: float | None
    read: float

    def floor_ms(self, products: float, passes: int, weight_bytes: float) -> float | None:
        """Of `products` multiply-adds of nibbles and activations of `passes` bytes."""
        if self.byte_products is None:
            return None
        computing = products * passes / self.byte_products
        return 1e-6 * max(computing, weight_bytes / self.read)


def measure(threads: int | None = None) -> Machine:
    from awq.native.pool import usable_cores

    threads = threads or usable_cores()
    return Machine(
        threads=threads,
        byte_products=_products(_emit_bytes, 64, threads),
        bfloat16_products=_products(_emit_bfloat16, 32, threads),
        read=_read(threads),
    )


# Loops of one instruction


def _emit_bytes(module: Any, element: Any) -> list[Any]:
    from awq.kernels.cpu import engine
    from awq.kernels.cpu.ir_types import I8, I32, vec

    target = engine.host_target()
    return _emit_loop(
        module, vec(I32), vec(I8, 64), lambda b, total, x, y: target.dot(b, total, x, y)
    )


def _emit_bfloat16(module: Any, element: Any) -> list[Any]:
    from llvmlite import ir

    from awq.kernels.cpu.ir_types import F32, vec

    def dot(b: Any, total: Any, x: Any, y: Any) -> Any:
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        return b.intrinsic(name, total.type, [total, x, y])

    module.triple = ""
    pairs = ir.VectorType(_bfloat16(), 32)
    return _emit_loop(module, vec(F32), pairs, dot)


def _bfloat16() -> Any:
    """llvmlite has no name for LLVM's type."""
    from llvmlite import ir

    class BFloat(ir.Type):
        def _to_string(self) -> str:
            return "bfloat"

        def __eq__(self, other: object) -> bool:
            return isinstance(other, BFloat)

        def __hash__(self) -> int:
            return hash(BFloat)

    return BFloat()


def _emit_loop(module: Any, sums: Any, operand: Any, dot: Callable[..., Any]) -> list[Any]:
    """loop(turns, memory): `SUMS` products a turn, of operands that are read once."""
    from awq.kernels.cpu.emit import Emitter
    from awq.kernels.cpu.ir_types import I8, I64, PTR
    from awq.kernels.cpu.values import Value

    b, (turns, memory) = Emitter.define(module, "loop", [I64, PTR])
    memory = b.as_type(memory, I8)
    x, y = (Value(b, b.builder.load((memory + 64 * i).ir, typ=operand)) for i in range(2))
    totals = [
        b.variable(sums, Value(b, b.builder.load((memory + 64 * i).ir, typ=sums)))
        for i in range(SUMS)
    ]
    with b.loop(0, turns):
        for total in totals:
            total.value = dot(b, total.value, x, y)
    for i, total in enumerate(totals):
        b.builder.store(total.value.ir, (memory + 64 * i).ir)

    return [b.finish()]


def _products(emit: Callable[..., Any], each: int, threads: int) -> float | None:
    """10⁹ multiply-adds a second of all threads; None where the CPU lacks the instruction."""
    import torch

    from awq.kernels.cpu import engine
    from awq.native.machine import MachineCode, binding

    features = binding().get_host_cpu_features()
    if engine.host_target() is None:
        return None
    if emit is _emit_bfloat16 and not features.get("avx512bf16"):
        return None

    code = MachineCode(engine.object_code(emit, torch.float32))
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p)
    loop = kind(code.address("loop"))

    def run(index: int) -> None:
        memory = (ctypes.c_char * (64 * (SUMS + 1)))()
        address = ctypes.addressof(memory)
        loop(TURNS, address + -address % 64)

    return 1e-9 * threads * TURNS * SUMS * each / _shortest(run, threads)


def _read(threads: int) -> float:
    """10⁹ bytes a second of all threads."""
    import numpy

    parts = numpy.ones((threads, READ_BYTES // 8 // threads), numpy.int64)

    def run(index: int) -> None:
        parts[index].max()

    return 1e-9 * READ_BYTES / _shortest(run, threads)


def _shortest(run: Callable[[int], None], threads: int) -> float:
    """Seconds of the shortest of some runs on all threads together."""
    times = []
    for _ in range(RUNS):
        together = threading.Barrier(threads + 1)

        def work(index: int, together: threading.Barrier = together) -> None:
            together.wait()
            run(index)
            together.wait()

        for i in range(threads):
            threading.Thread(target=work, args=(i,)).start()
        together.wait()
        began = time.perf_counter()
        together.wait()
        times.append(time.perf_counter() - began)

    return min(times)


if __name__ == "__main__":
    print(json.dumps(measure()._asdict()))
