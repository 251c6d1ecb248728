"""`Emitter`: builds one function of LLVM IR, with variables, loops, vectors, and floats of three
kinds.

A kernel takes a `Task` and consists of parts: `part(task, i, n)` does the i-th of n shares of the
work. All shares of one part are done before the next part begins. `values` has the numbers and
pointers that emitters compute with.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from awq.kernels.cpu.ir_types import F16, F32, I16, I32, I64, LANES, PTR, VOID, const, lanes_of, vec
from awq.kernels.cpu.values import Number, Pointer, Value, Variable

# Cody and Waite: ln 2 in two parts, so that x − n · ln 2 keeps its last bits.
_LN2_HIGH = 0.693145751953125
_LN2_LOW = 1.4286068203094172e-06
_LOG2_E = 1.4426950408889634


class Emitter:
    """Appends instructions to one function. `builder` is llvmlite's own, for what is missing
    here."""

    def __init__(self, function: ir.Function) -> None:
        self.function = function
        self.module: ir.Module = function.module
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))

    @classmethod
    def define(
        cls,
        module: ir.Module,
        name: str,
        arguments: Sequence[ir.Type],
        internal: bool = False,
    ) -> tuple[Emitter, list[Any]]:
        """(emitter at the start of a new function without result, its arguments). A pointer
        argument points to int64."""
        function = ir.Function(module, ir.FunctionType(VOID, arguments), name)
        if internal:
            function.linkage = "internal"
        b = cls(function)

        found: list[Any] = []
        for argument in function.args:
            is_pointer = argument.type == PTR
            found.append(Pointer(b, argument, I64) if is_pointer else Value(b, argument))

        return b, found

    @classmethod
    def define_part(cls, module: ir.Module, name: str) -> tuple[Emitter, Pointer, Value, Value]:
        """(emitter, task, index, count) of a new part of a kernel."""
        b, (task, index, count) = cls.define(module, name, [PTR, I64, I64])
        return b, task, index, count

    def finish(self) -> ir.Function:
        """Ends the function."""
        self.builder.ret_void()
        return self.function

    # Numbers and places

    def const(self, type: ir.Type, value: float) -> Value:
        return Value(self, const(type, value))

    def integers(self, bits: int, lanes: int) -> ir.VectorType:
        """The type of a vector of integers."""
        return vec(ir.IntType(bits), lanes)

    def variable(self, type: ir.Type, value: Number) -> Variable:
        with self.builder.goto_entry_block():
            address = self.builder.alloca(type)
        place = Variable(self, address, type)
        place.value = value if isinstance(value, Value) else self.const(type, value)
        return place

    def pointer(self, bits: Value, element: ir.Type) -> Pointer:
        """The pointer whose address is an int64."""
        return Pointer(self, self.builder.inttoptr(bits.ir, PTR), element)

    def float_of(self, bits: Value) -> Value:
        """The float32 whose bits are the lower half of an int64."""
        return Value(self, self.builder.bitcast(self.builder.trunc(bits.ir, I32), F32))

    def as_type(self, pointer: Pointer, element: ir.Type) -> Pointer:
        """The same address, pointing to another type."""
        return Pointer(self, pointer.ir, element)

    # Control

    @contextmanager
    def loop(self, start: Number, stop: Number, step: int = 1) -> Iterator[Value]:
        """`for i in range(start, stop, step)` on int64; yields i. No turn is made when start ≥
        stop."""
        builder = self.builder
        index = self.variable(I64, start)
        head, body, end = (builder.append_basic_block(name) for name in ("head", "body", "end"))
        builder.branch(head)
        builder.position_at_end(head)
        i = index.value
        builder.cbranch((i < stop).ir, body, end)
        builder.position_at_end(body)
        yield i
        index.value = i + step
        builder.branch(head)
        builder.position_at_end(end)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """`if condition:`"""
        with self.builder.if_then(condition.ir):
            yield

    def select(self, condition: Value, yes: Value, no: Number) -> Value:
        other = no if isinstance(no, Value) else self.const(yes.type, no)
        return Value(self, self.builder.select(condition.ir, yes.ir, other.ir))

    def part(self, total: Value, index: Value, count: Value) -> tuple[Value, Value]:
        """(start, stop) of the index-th of `count` even parts of `total`."""
        return total * index // count, total * (index + 1) // count

    def call(self, function: ir.Function, arguments: Sequence[Value | Pointer]) -> Value:
        return Value(self, self.builder.call(function, [argument.ir for argument in arguments]))

    # LLVM's intrinsics

    def intrinsic(self, name: str, result: ir.Type, arguments: Sequence[Value | Pointer]) -> Value:
        return self.call(self.declared(name, result, [a.ir.type for a in arguments]), arguments)

    def declared(self, name: str, result: ir.Type, arguments: Sequence[ir.Type]) -> ir.Function:
        found = self.module.globals.get(name)
        return found or ir.Function(self.module, ir.FunctionType(result, arguments), name)

    def math(self, name: str, *arguments: Value) -> Value:
        """LLVM's intrinsic of that name on floats or vectors of them: fma, fabs, rint, maximum …"""
        type = arguments[0].type
        lanes = lanes_of(type)
        suffix = f"v{lanes}f32" if lanes else "f32"
        return self.intrinsic(f"llvm.{name}.{suffix}", type, arguments)

    def fma(self, a: Value, factor: Value, addend: Number) -> Value:
        """a · factor + addend, rounded once."""
        return self.math(
            "fma", a, factor, addend if isinstance(addend, Value) else self.const(a.type, addend)
        )

    def maximum(self, a: Value, b: Number) -> Value:
        """The larger one; NaN when either is NaN."""
        return self.math("maximum", a, b if isinstance(b, Value) else self.const(a.type, b))

    def minimum(self, a: Value, b: Number) -> Value:
        return self.math("minimum", a, b if isinstance(b, Value) else self.const(a.type, b))

    def prefetch(self, place: Pointer) -> None:
        """Fetches a cache line; beyond the end of memory nothing happens."""
        read, keep, data = (self.const(I32, number) for number in (0, 3, 1))
        self.intrinsic("llvm.prefetch.p0", VOID, [place, read, keep, data])

    def smaller(self, a: Value, b: Value) -> Value:
        """The smaller of two integers."""
        return self.select(a < b, a, b)

    # Memory that several threads write

    def fetch_add(self, place: Pointer, number: int | Value) -> Value:
        """Adds to an int64 and returns what was there before."""
        addend = number.ir if isinstance(number, Value) else const(I64, number)
        return Value(self, self.builder.atomic_rmw("add", place.ir, addend, "seq_cst"))

    def swap(self, place: Pointer, value: Value) -> Value:
        """Writes an int64 and returns what was there before."""
        return Value(self, self.builder.atomic_rmw("xchg", place.ir, value.ir, "seq_cst"))

    def atomic_load(self, place: Pointer) -> Value:
        return Value(self, self.builder.load_atomic(place.ir, "acquire", 8, typ=I64))

    def compare_and_swap(self, place: Pointer, expected: Value, value: Value) -> Value:
        """Writes an int64 if `expected` is there; whether it was."""
        pair = self.builder.cmpxchg(place.ir, expected.ir, value.ir, "seq_cst", "seq_cst")
        return Value(self, self.builder.extract_value(pair, 1))

    def pause(self) -> None:
        """Tells the core that it is waiting, where there is an instruction for it."""
        if platform.machine() in ("x86_64", "AMD64"):
            self.intrinsic("llvm.x86.sse2.pause", VOID, [])

    def address(self, pointer: Pointer) -> Value:
        return Value(self, self.builder.ptrtoint(pointer.ir, I64))

    # Conversions

    def zext(self, value: Value, type: ir.Type) -> Value:
        return Value(self, self.builder.zext(value.ir, type))

    def sext(self, value: Value, type: ir.Type) -> Value:
        return Value(self, self.builder.sext(value.ir, type))

    def trunc(self, value: Value, type: ir.Type) -> Value:
        return Value(self, self.builder.trunc(value.ir, type))

    def bitcast(self, value: Value, type: ir.Type) -> Value:
        return Value(self, self.builder.bitcast(value.ir, type))

    def signed_to_float(self, value: Value, type: ir.Type) -> Value:
        return Value(self, self.builder.sitofp(value.ir, type))

    def unsigned_to_float(self, value: Value, type: ir.Type) -> Value:
        return Value(self, self.builder.uitofp(value.ir, type))

    def round_to_int(self, value: Value) -> Value:
        """The nearest int32 of each lane, ties to even; what is too large becomes the largest."""
        return self._saturated(self.math("rint", value))

    def _saturated(self, value: Value) -> Value:
        lanes = lanes_of(value.type)
        return self.intrinsic(f"llvm.fptosi.sat.v{lanes}i32.v{lanes}f32", vec(I32, lanes), [value])

    def to_float(self, value: Value) -> Value:
        """float32 of a vector of float32, float16, or (as int16) bfloat16 bits."""
        kind = value.type.element
        lanes = value.type.count
        if kind == I16:
            return self.bitcast(self.zext(value, vec(I32, lanes)) << 16, vec(F32, lanes))
        if kind == F32:
            return value
        return Value(self, self.builder.fpext(value.ir, vec(F32, lanes)))

    def half_to_float(self, value: Value) -> Value:
        """float32 of one float16."""
        return Value(self, self.builder.fpext(value.ir, F32))

    def from_float(self, value: Value, kind: ir.Type) -> Value:
        """Inverse of `to_float`, rounding to nearest even; NaN stays NaN."""
        lanes = value.type.count
        if kind == F32:
            return value
        if kind == F16:
            return Value(self, self.builder.fptrunc(value.ir, vec(F16, lanes)))

        wide = vec(I32, lanes)
        bits = self.bitcast(value, wide)
        odd = bits.shift_right(16) & 1
        rounded = bits + (odd + 0x7FFF)
        is_nan = Value(self, self.builder.fcmp_unordered("uno", value.ir, value.ir))
        rounded = self.select(is_nan, self.const(wide, 0x7FC00000), rounded)

        return self.trunc(rounded.shift_right(16), vec(I16, lanes))

    # Vectors

    def splat(self, value: Value, lanes: int = LANES) -> Value:
        """A vector with the same number in every lane."""
        type = vec(value.type, lanes)
        first = self.builder.insert_element(
            ir.Constant(type, ir.Undefined), value.ir, const(I32, 0)
        )
        return Value(
            self,
            self.builder.shuffle_vector(
                first, ir.Constant(type, ir.Undefined), const(vec(I32, lanes), 0)
            ),
        )

    def slice(self, value: Value, start: int, count: int) -> Value:
        """Lanes start … start + count."""
        lanes = ir.Constant(vec(I32, count), list(range(start, start + count)))
        return Value(
            self,
            self.builder.shuffle_vector(value.ir, ir.Constant(value.type, ir.Undefined), lanes),
        )

    def joined(self, parts: Sequence[Value]) -> Value:
        """Vectors of the same length, a power of two of them, one after the other."""
        vectors = [part.ir for part in parts]
        while len(vectors) > 1:
            lanes = 2 * vectors[0].type.count
            both = ir.Constant(vec(I32, lanes), list(range(lanes)))
            vectors = [
                self.builder.shuffle_vector(a, b, both) for a, b in zip(vectors[::2], vectors[1::2])
            ]
        return Value(self, vectors[0])

    def lane(self, value: Value, index: int) -> Value:
        return Value(self, self.builder.extract_element(value.ir, const(I32, index)))

    def sum(self, value: Value) -> Value:
        """The sum of a vector's lanes, in any order."""
        if value.type.count == 1:
            return self.lane(value, 0)

        name = f"llvm.vector.reduce.fadd.v{value.type.count}f32"
        function = self.declared(name, F32, [F32, value.type])

        return Value(
            self, self.builder.call(function, [const(F32, 0.0), value.ir], fastmath=("reassoc",))
        )

    def largest(self, value: Value) -> Value:
        """The largest of a vector's lanes, none of them NaN."""
        function = self.declared(
            f"llvm.vector.reduce.fmax.v{value.type.count}f32", F32, [value.type]
        )
        return Value(self, self.builder.call(function, [value.ir], fastmath=("nnan",)))

    def strip(self, count: Value, body: Callable[[Value, int], None]) -> None:
        """body(i, lanes) over range(count): 16 at a time, then one by one. It loads vectors of
        `lanes`."""
        whole = count & -LANES
        with self.loop(0, whole, LANES) as i:
            body(i, LANES)
        with self.loop(whole, count) as i:
            body(i, 1)

    def total(self, count: Value, body: Callable[[Value, int], Value]) -> Value:
        """Σ of the vectors body(i, lanes) over range(count), as one float."""
        sums = {lanes: self.variable(vec(F32, lanes), 0.0) for lanes in (LANES, 1)}

        def add(i: Value, lanes: int) -> None:
            sums[lanes].value = sums[lanes].value + body(i, lanes)

        self.strip(count, add)
        wide, single = (self.sum(place.value) for place in sums.values())

        return wide + single

    # Functions

    def exp(self, x: Value) -> Value:
        """e^x to float32's precision; below e^-87 and above e^88 it stays there. NaN stays NaN."""
        type = x.type
        x = self.minimum(self.maximum(x, -87.0), 88.0)
        n = self.math("rint", x * _LOG2_E)
        r = self.fma(n, self.const(type, -_LN2_HIGH), x)
        r = self.fma(n, self.const(type, -_LN2_LOW), r)
        y = self.const(type, 1 / 720)
        for c in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
            y = self.fma(y, r, c)

        power = (self._saturated(n) + 127) << 23
        return y * self.bitcast(power, type)
