"""Running a kernel's parts in a team of threads, unless a busy machine makes the team slow.

All shares of a part must be done before the next part begins. On a quiet machine that costs
microseconds. Beside a busy process the system takes a thread's core away for milliseconds, and the
others wait: a decode step, which is hundreds of parts, then takes a hundred times as long. So a
caller measures what it lost by waiting. When that is more than it worked, it leaves the team alone
for a while and does all shares itself; the while doubles with every such loss, and shrinks again
while the team is quick. A caller alone gets its proportional share of a busy machine.

The threads are those of the OpenMP library that torch runs on. Which thread does a share changes no
bit of the result.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from llvmlite import ir

from awq.kernels.cpu.emit import Emitter
from awq.kernels.cpu.ir_types import I32, I64, PTR, VOID, const
from awq.kernels.cpu.values import Pointer

# Nanoseconds
LEAST_LOSS = 200_000  # more than waking a thread takes
SHORTEST_PAUSE, LONGEST_PAUSE = 1_000_000, 100_000_000
SHRINKING = 6  # a quick part takes 1/2^6 off the pause
MONOTONIC = 1  # clock_gettime's number of the clock

# Int64s of the state that all kernels of a process share: until when callers leave the team alone,
# and how long the last pause was.
UNTIL, PAUSE, STATE_FIELDS = 0, 1, 2
# Of one call of a part: its task, and when the caller's own share began and ended.
TASK, BEGAN, ENDED, CALL_FIELDS = 0, 1, 2, 3


def new_state() -> ctypes.Array[ctypes.c_int64]:
    """The state before anything was lost."""
    return (ctypes.c_int64 * STATE_FIELDS)(0, SHORTEST_PAUSE)


def emit_entry(module: ir.Module, parts: Sequence[ir.Function]) -> None:
    """`run(task, state)`: the parts one after the other, the i-th in as many threads as the task's
    i-th field says."""
    clock = _emit_clock(module)
    team = _emit_team(module, clock)
    shares = [_emit_share(module, part, clock) for part in parts]
    b, (task, state) = Emitter.define(module, "run", [PTR, PTR])
    for i, (part, share) in enumerate(zip(parts, shares)):
        threads = task.load(i, align=8)
        with b.builder.if_else((threads > 1).ir) as (several, single):
            with several:
                rests = b.call(clock, []) < b.atomic_load(state + UNTIL)
                with b.builder.if_else(rests.ir) as (alone, together):
                    with alone:
                        _call_alone(b, part, task)
                    with together:
                        b.call(team, [Pointer(b, share, I64), task, threads, state])
            with single:
                _call_alone(b, part, task)
    b.finish()


def _call_alone(b: Emitter, part: ir.Function, task: Pointer) -> None:
    b.call(part, [task, b.const(I64, 0), b.const(I64, 1)])


def _emit_clock(module: ir.Module) -> ir.Function:
    """clock(): nanoseconds int64."""
    function = ir.Function(module, ir.FunctionType(I64, []), "clock_ns")
    function.linkage = "internal"
    b = Emitter(function)
    time = Pointer(b, b.builder.alloca(I64, 2), I64)
    read = b.declared("clock_gettime", I32, [I32, PTR])
    b.builder.call(read, [const(I32, MONOTONIC), time.ir])
    b.builder.ret((time[0] * 1_000_000_000 + time[1]).ir)
    return function


def _emit_share(module: ir.Module, part: ir.Function, clock: ir.Function) -> ir.Function:
    """share(call): what a thread of the team does; the caller notes when it began and ended."""
    b, (call,) = Emitter.define(module, f"{part.name}_share", [PTR], internal=True)
    number = b.declared("omp_get_thread_num", I32, [])
    size = b.declared("omp_get_num_threads", I32, [])
    index = b.sext(b.call(number, []), I64)
    count = b.sext(b.call(size, []), I64)
    task = b.pointer(call[TASK], I64)
    is_caller = index.equals(0)
    with b.when(is_caller):
        call[BEGAN] = b.call(clock, [])
    b.call(part, [task, index, count])
    with b.when(is_caller):
        call[ENDED] = b.call(clock, [])
    return b.finish()


def _emit_team(module: ir.Module, clock: ir.Function) -> ir.Function:
    """team(share, task, threads, state): the shares, and what their slowness means for later."""
    b, (share, task, threads, state) = Emitter.define(
        module, "team", [PTR, PTR, I64, PTR], internal=True
    )
    fork = b.declared("GOMP_parallel", VOID, [PTR, PTR, I32, I32])
    call = Pointer(b, b.builder.alloca(I64, CALL_FIELDS), I64)
    call[TASK] = b.address(task)
    count = b.trunc(threads, I32)
    flags = const(I32, 0)
    began = b.call(clock, [])
    b.builder.call(fork, [share.ir, call.ir, count.ir, flags])
    ended = b.call(clock, [])
    worked = call[ENDED] - call[BEGAN]
    lost = (ended - began) - worked
    pause = b.atomic_load(state + PAUSE)
    is_slow = (lost > worked) & (lost > LEAST_LOSS)
    with b.builder.if_else(is_slow.ir) as (slow, quick):
        with slow:
            longer = b.smaller(pause * 2, b.const(I64, LONGEST_PAUSE))
            b.swap(state + PAUSE, longer)
            b.swap(state + UNTIL, ended + longer)
        with quick:
            shorter = pause - pause.shift_right(SHRINKING)
            with b.when(shorter >= SHORTEST_PAUSE):
                b.swap(state + PAUSE, shorter)
    return b.finish()
