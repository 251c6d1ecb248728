"""Running a kernel's parts in a team of threads, unless a busy machine makes the team slow.

All shares of a part must be done before the next part begins. On a quiet machine that costs
microseconds. Beside a busy process the system takes a thread's core away for milliseconds, and the
others wait: a decode step, which is hundreds of parts, then takes a hundred times as long. So a
caller measures what it lost by waiting. When that is more than it worked, the team has a quarter
fewer threads for a while, of two threads the caller alone; the while doubles with every such loss,
and shrinks again while the whole team is quick. So many threads get their proportional share of a
busy machine.

The threads are those of the OpenMP library that torch runs on. Which thread does a share changes no
bit of the result.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from llvmlite import ir

from awq.kernels.cpu.emit import Emitter
from awq.kernels.cpu.ir_types import I32, I64, PTR, VOID, const
from awq.kernels.cpu.values import Pointer, Value

# Nanoseconds
LEAST_LOSS = 200_000  # a team that has just worked begins and ends in less
ASLEEP = 1_000_000  # a team that has not worked for so long has gone to sleep, and waking it
LEAST_LOSS_OF_WAKING = 2_000_000  # may take so long where there are many threads
SHORTEST_PAUSE, LONGEST_PAUSE = 1_000_000, 100_000_000
SHRINKING = 6  # a quick part takes 1/2^6 off the pause
MONOTONIC = 1  # clock_gettime's number of the clock

# Int64s of the state that all kernels of a process share: until when the team is small, how small,
# how long the last pause was, and when a team last worked.
UNTIL, SIZE, PAUSE, LAST, STATE_FIELDS = 0, 1, 2, 3, 4
# Of one call of a part: its task, and when the caller's own share began and ended.
TASK, BEGAN, ENDED, CALL_FIELDS = 0, 1, 2, 3


def new_state() -> ctypes.Array[ctypes.c_int64]:
    """The state before anything was lost."""
    return (ctypes.c_int64 * STATE_FIELDS)(0, 1, SHORTEST_PAUSE, 0)


def emit_entry(module: ir.Module, parts: Sequence[ir.Function]) -> None:
    """`run(task, state)`: the parts one after the other, the i-th in as many threads as the task's
    i-th field says."""
    clock = _emit_clock(module)
    size = _emit_size(module, clock)
    team = _emit_team(module, clock)
    shares = [_emit_share(module, part, clock) for part in parts]
    b, (task, state) = Emitter.define(module, "run", [PTR, PTR])

    for i, (part, share) in enumerate(zip(parts, shares)):
        threads = b.call(size, [task.load(i, align=8), state])
        with b.builder.if_else(threads.equals(1).ir) as (alone, together):
            with alone:
                b.call(part, [task, b.const(I64, 0), b.const(I64, 1)])
            with together:
                b.call(team, [Pointer(b, share, I64), task, threads, state])

    b.finish()


def _emit_size(module: ir.Module, clock: ir.Function) -> ir.Function:
    """size(threads, state): how many of the threads shall work now."""
    function = ir.Function(module, ir.FunctionType(I64, [I64, PTR]), "size")
    function.linkage = "internal"
    b = Emitter(function)
    threads = Value(b, function.args[0])
    state = Pointer(b, function.args[1], I64)
    found = b.variable(I64, threads)

    with b.when(threads > 1):
        now = b.call(clock, [])
        until = b.atomic_load(state + UNTIL)
        with b.when(now < until):
            small = b.atomic_load(state + SIZE)
            found.value = b.smaller(threads, small)

    b.builder.ret(found.value.ir)
    return function


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
    idle = began - b.swap(state + LAST, ended)
    least = b.select(idle > ASLEEP, b.const(I64, LEAST_LOSS_OF_WAKING), LEAST_LOSS)
    is_slow = (lost > worked) & (lost > least)

    with b.builder.if_else(is_slow.ir) as (slow, quick):
        with slow:
            _shrink(b, state, threads, ended)
        with quick:
            _recover(b, state, ended)

    return b.finish()


def _shrink(b: Emitter, state: Pointer, threads: Value, now: Value) -> None:
    """A smaller team, for twice as long as the last time."""
    pause = b.atomic_load(state + PAUSE)
    longer = b.smaller(pause * 2, b.const(I64, LONGEST_PAUSE))
    b.swap(state + SIZE, threads * 3 // 4)
    b.swap(state + PAUSE, longer)
    b.swap(state + UNTIL, now + longer)


def _recover(b: Emitter, state: Pointer, now: Value) -> None:
    """Shorter pauses, where the whole team was quick."""
    pause = b.atomic_load(state + PAUSE)
    shorter = pause - pause.shift_right(SHRINKING)
    is_whole = now > b.atomic_load(state + UNTIL)
    with b.when(is_whole & (shorter >= SHORTEST_PAUSE)):
        b.swap(state + PAUSE, shorter)
