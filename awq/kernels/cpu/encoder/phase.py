"""A phase's items, and who computes them: the caller and its helpers, until none is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir

from awq.kernels.cpu.emit import Emitter
from awq.kernels.cpu.ir_types import I32, I64, PTR
from awq.kernels.cpu.task import Reader
from awq.kernels.cpu.values import Pointer, Value
from awq.native.pool import (
    POOL_AWAKE,
    POOL_BACK,
    POOL_JOB,
    POOL_SEMAPHORE,
    POOL_STOP,
    POOL_TICKETS,
)
from awq.native.spec import EncoderSpec

SPINS_BEFORE_YIELD = 2000
# How long a helper looks for more work: what a caller needs to tokenize the next short text.
AWAKE_NS = 150_000
PAUSES_PER_LOOK = 8
CLOCK_MONOTONIC = 1  # of Linux, where helpers are


class Phase(NamedTuple):
    """What an item's emitter works with. t: the job; layer: the layer's weights; worker: who
    computes, from 0."""

    b: Emitter
    t: Reader
    layer: Reader
    worker: Value
    spec: EncoderSpec


Item = Callable[[Phase, Value], None]


def run_phase(
    b: Emitter,
    function: ir.Function,
    items: Value,
    counters: Pointer,
    job: Pointer,
    layer: Pointer,
    worker: Value,
    workers: Value,
) -> None:
    """All items of a phase. Worker 0 takes them from the front, the others from the back: each
    meets the same weights again in the next call, and finds them in its own cache.

    Items of a short text take a microsecond, and a counter that two cores write takes a tenth of
    it: one helper counts its own items, and what is done is told once.
    """
    with b.builder.if_else(workers.equals(1).ir) as (alone, together):
        with alone, b.loop(0, items) as item:
            b.call(function, [job, layer, worker, item])
        with together:
            own = b.variable(I64, 0)
            with endless(b) as leave:
                leave(b.fetch_add(counters, 1) >= items)
                chosen = b.variable(I64, own.value)
                with b.when(worker.differs(0)):
                    taken = b.variable(I64, own.value)
                    with b.when(workers > 2):
                        taken.value = b.fetch_add(counters + 1, 1)
                    chosen.value = items - 1 - taken.value

                b.call(function, [job, layer, worker, chosen.value])
                own.value = own.value + 1

            b.fetch_add(counters + 2, own.value)
            _wait(b, counters + 2, items)


class endless:
    """`while True:` whose body leaves it with `leave(condition)`."""

    def __init__(self, b: Emitter) -> None:
        self._b = b

    def __enter__(self) -> Callable[[Value], None]:
        builder = self._b.builder
        self._body = builder.append_basic_block("again")
        self._end = builder.append_basic_block("left")
        builder.branch(self._body)
        builder.position_at_end(self._body)
        return self._leave

    def _leave(self, condition: Value) -> None:
        builder = self._b.builder
        on = builder.append_basic_block("on")
        builder.cbranch(condition.ir, self._end, on)
        builder.position_at_end(on)

    def __exit__(self, *_error: object) -> None:
        self._b.builder.branch(self._body)
        self._b.builder.position_at_end(self._end)


def _wait(b: Emitter, counter: Pointer, value: Value) -> None:
    """Until a counter has reached a value: a short spin, then the core is offered to others again
    and again."""
    spins = b.variable(I64, 0)
    give_way = b.declared("sched_yield", I32, [])
    with endless(b) as leave:
        leave(b.atomic_load(counter) >= value)
        spins.value = spins.value + 1
        b.pause()
        with b.when(spins.value > SPINS_BEFORE_YIELD):
            b.builder.call(give_way, [])


def emit_serve(module: ir.Module, forward: ir.Function) -> ir.Function:
    """serve(pool): a helper's life. It sleeps until it is called, and takes a ticket or sleeps on.
    After its work it looks for the next ticket for a moment: waking up takes as long as a third of
    a short text.
    """
    b, (pool,) = Emitter.define(module, "serve", [PTR])
    sleep = b.declared("sem_wait", I32, [PTR])
    clock = _Clock(b)

    def take_ticket() -> Value:
        """Works if there is a ticket; whether there was."""
        found = b.variable(I64, 0)
        # not a mere load: see emit_call
        ticket = b.fetch_add(pool + POOL_TICKETS, 0)
        with (
            b.when(ticket > 0),
            b.when(b.compare_and_swap(pool + POOL_TICKETS, ticket, ticket - 1)),
        ):
            job = b.pointer(pool[POOL_JOB], I64)
            b.call(forward, [job, ticket])
            b.fetch_add(pool + POOL_BACK, 1)
            found.value = b.const(I64, 1)

        return found.value

    with endless(b) as leave:
        b.builder.call(sleep, [(pool + POOL_SEMAPHORE).ir])
        leave(b.atomic_load(pool + POOL_STOP).differs(0))
        with b.when(take_ticket().differs(0)):
            b.fetch_add(pool + POOL_AWAKE, 1)
            end = b.variable(I64, clock.now() + AWAKE_NS)
            with endless(b) as doze:
                doze(clock.now() > end.value)
                with b.loop(0, PAUSES_PER_LOOK):
                    b.pause()
                with (
                    b.when(b.atomic_load(pool + POOL_TICKETS) > 0),
                    b.when(take_ticket().differs(0)),
                ):
                    end.value = clock.now() + AWAKE_NS

            b.fetch_add(pool + POOL_AWAKE, -1)
            # a caller that counted on this helper a moment ago has not woken it
            take_ticket()

    return b.finish()


def emit_call(module: ir.Module, forward: ir.Function) -> ir.Function:
    """call(pool, job, helpers): the job, by the caller and as many helpers as come in time.

    Helpers that look for tickets are not woken. A caller writes tickets and then counts those
    helpers; a helper stops being counted and then looks once more. Both orders hold for all threads
    (all four are sequentially consistent), so no ticket is left to a helper that sleeps.
    """
    b, (pool, job, helpers) = Emitter.define(module, "call", [PTR, PTR, I64])
    wake = b.declared("sem_post", I32, [PTR])
    pool[POOL_JOB] = b.address(job)
    pool[POOL_BACK] = b.const(I64, 0)
    b.swap(pool + POOL_TICKETS, helpers)
    with b.loop(b.fetch_add(pool + POOL_AWAKE, 0), helpers):
        b.builder.call(wake, [(pool + POOL_SEMAPHORE).ir])

    b.call(forward, [job, b.const(I64, 0)])
    left = b.swap(pool + POOL_TICKETS, b.const(I64, 0))
    _wait(b, pool + POOL_BACK, helpers - left)

    return b.finish()


class _Clock:
    """The system's monotonic clock."""

    def __init__(self, b: Emitter) -> None:
        self._b = b
        with b.builder.goto_entry_block():
            self._time = Pointer(b, b.builder.alloca(ir.ArrayType(I64, 2)), I64)

    def now(self) -> Value:
        """Nanoseconds."""
        b = self._b
        read = b.declared("clock_gettime", I32, [I32, PTR])
        b.builder.call(read, [b.const(I32, CLOCK_MONOTONIC).ir, self._time.ir])
        return self._time[0] * 1_000_000_000 + self._time[1]
