"""A thin layer over llvmlite's builder: variables, loops, vectors, and floats of three kinds.

A kernel takes a task, an array of 64-bit fields: numbers of threads first, then pointers, integers and floats by name. Its
parts `part(task, i, n)` do the i-th of n shares of the work, one part after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from awq.kernels.cpu.targets import LANES

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32, PTR, VOID = ir.HalfType(), ir.FloatType(), ir.PointerType(), ir.VoidType()


ELEMENTS = {"float32": F32, "float16": F16, "bfloat16": I16}  # by torch's names


def vec(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def const(type: ir.Type, value: float) -> ir.Constant:
    """A constant; of a vector type: that value in every lane."""
    if isinstance(type, ir.VectorType):
        return ir.Constant(type, [ir.Constant(type.element, value)] * type.count)
    return ir.Constant(type, value)


class Emitter(ir.IRBuilder):
    """A builder of one function, with variables that LLVM turns into registers."""

    @classmethod
    def define(cls, module: ir.Module, name: str, arguments: Sequence[ir.Type], internal: bool = False) -> tuple[Emitter, Any]:
        """(builder at the start of a new function without result, its arguments)."""
        function = ir.Function(module, ir.FunctionType(VOID, arguments), name)
        if internal:
            function.linkage = "internal"
        return cls(function.append_basic_block("entry")), function.args

    def variable(self, type: ir.Type, value: Any) -> Any:
        with self.goto_entry_block():
            place = self.alloca(type)
        self.store(value, place)
        return place

    def get(self, place: Any, type: ir.Type) -> Any:
        return self.load(place, typ=type)

    @contextmanager
    def loop(self, start: Any, stop: Any, step: int = 1) -> Iterator[Any]:
        """`for i in range(start, stop, step)` on int64; yields i. No turn is made when start ≥ stop."""
        index = self.variable(I64, start)
        head, body, end = (self.append_basic_block(name) for name in ("head", "body", "end"))
        self.branch(head)
        self.position_at_end(head)
        i = self.get(index, I64)
        self.cbranch(self.icmp_signed("<", i, stop), body, end)
        self.position_at_end(body)
        yield i
        self.store(self.add(i, const(I64, step)), index)
        self.branch(head)
        self.position_at_end(end)

    def part(self, total: Any, index: Any, count: Any) -> tuple[Any, Any]:
        """(start, stop) of the index-th of `count` even parts of `total`."""
        return self.sdiv(self.mul(total, index), count), self.sdiv(self.mul(total, self.add(index, const(I64, 1))), count)

    def at(self, base: Any, index: Any, element: ir.Type) -> Any:
        """Address of base[index]."""
        return self.gep(base, [index], source_etype=element)

    def fetch(self, base: Any, index: Any, element: ir.Type, lanes: int = 0, align: int = 1) -> Any:
        """base[index], or `lanes` elements from there."""
        return self.load(self.at(base, index, element), typ=vec(element, lanes) if lanes else element, align=align)

    def put(self, value: Any, base: Any, index: Any, element: ir.Type, align: int = 1) -> None:
        self.store(value, self.at(base, index, element), align=align)

    def prefetch(self, base: Any, offset: Any) -> None:
        """Fetches the cache line at base + offset bytes; beyond the end of memory nothing happens."""
        self.intrinsic("llvm.prefetch.p0", VOID, [self.at(base, offset, I8), const(I32, 0), const(I32, 3), const(I32, 1)])

    def splat(self, value: Any, lanes: int = LANES) -> Any:
        type = vec(value.type, lanes)
        first = self.insert_element(ir.Constant(type, ir.Undefined), value, const(I32, 0))
        return self.shuffle_vector(first, ir.Constant(type, ir.Undefined), const(vec(I32, lanes), 0))

    def slice(self, value: Any, start: int, count: int) -> Any:
        lanes = ir.Constant(vec(I32, count), list(range(start, start + count)))
        return self.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), lanes)

    def joined(self, parts: list[Any]) -> Any:
        """Vectors of the same length, a power of two of them, one after the other."""
        while len(parts) > 1:
            both = ir.Constant(vec(I32, 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
            parts = [self.shuffle_vector(a, b, both) for a, b in zip(parts[::2], parts[1::2])]
        return parts[0]

    def intrinsic(self, name: str, result: ir.Type, arguments: Sequence[Any]) -> Any:
        return self.call(self.intrinsic_function(name, result, [a.type for a in arguments]), arguments)

    def intrinsic_function(self, name: str, result: ir.Type, arguments: Sequence[ir.Type]) -> Any:
        return self.module.globals.get(name) or ir.Function(self.module, ir.FunctionType(result, arguments), name)

    def math(self, name: str, *arguments: Any) -> Any:
        """LLVM's intrinsic of that name on floats or vectors of them: fma, fabs, rint, maximum …"""
        type = arguments[0].type
        suffix = f"v{type.count}f32" if isinstance(type, ir.VectorType) else "f32"
        return self.intrinsic(f"llvm.{name}.{suffix}", type, arguments)

    def sum(self, value: Any) -> Any:
        """The sum of a vector's lanes, in any order."""
        if value.type.count == 1:
            return self.extract_element(value, const(I32, 0))
        function = self.intrinsic_function("llvm.vector.reduce.fadd.v16f32", F32, [F32, value.type])
        return self.call(function, [const(F32, 0.0), value], fastmath=("reassoc",))

    def exp(self, x: Any) -> Any:
        """e^x to float32's precision; below e^-87 and above e^88 it stays there. NaN stays NaN."""
        type = x.type
        ints = vec(I32, type.count)
        x = self.math("minimum", self.math("maximum", x, const(type, -87.0)), const(type, 88.0))
        n = self.math("rint", self.fmul(x, const(type, 1.4426950408889634)))
        r = self.math("fma", n, const(type, -0.693145751953125), x)
        r = self.math("fma", n, const(type, -1.4286068203094172e-06), r)
        y = const(type, 1 / 720)
        for c in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
            y = self.math("fma", y, r, const(type, c))
        whole = self.intrinsic(f"llvm.fptosi.sat.v{type.count}i32.v{type.count}f32", ints, [n])
        power = self.shl(self.add(whole, const(ints, 127)), const(ints, 23))
        return self.fmul(y, self.bitcast(power, type))

    def strip(self, count: Any, body: Any) -> None:
        """body(i, lanes) over range(count): 16 at a time, then one by one. What is loaded in it are vectors of `lanes`."""
        whole = self.and_(count, const(I64, -LANES))
        with self.loop(const(I64, 0), whole, LANES) as i:
            body(i, LANES)
        with self.loop(whole, count) as i:
            body(i, 1)

    def total(self, count: Any, body: Any) -> Any:
        """Σ of the vectors body(i, lanes) over range(count), as one float."""
        sums = {lanes: self.variable(vec(F32, lanes), const(vec(F32, lanes), 0.0)) for lanes in (LANES, 1)}

        def add(i: Any, lanes: int) -> None:
            self.store(self.fadd(self.get(sums[lanes], vec(F32, lanes)), body(i, lanes)), sums[lanes])

        self.strip(count, add)
        return self.fadd(*(self.sum(self.get(place, vec(F32, lanes))) for lanes, place in sums.items()))

    def floats(self, base: Any, index: Any, kind: ir.Type, lanes: int) -> Any:
        """`lanes` values from base[index], as float32."""
        return self.to_float(self.fetch(base, index, kind, lanes))

    def to_float(self, value: Any) -> Any:
        """float32 of a vector of float32, float16, or (as int16) bfloat16 bits."""
        kind, lanes = value.type.element, value.type.count
        if kind == I16:
            wide = self.shl(self.zext(value, vec(I32, lanes)), const(vec(I32, lanes), 16))
            return self.bitcast(wide, vec(F32, lanes))
        return value if kind == F32 else self.fpext(value, vec(F32, lanes))

    def from_float(self, value: Any, kind: ir.Type) -> Any:
        """Inverse of `to_float`, rounding to nearest even; NaN stays NaN."""
        lanes = value.type.count
        if kind == F32:
            return value
        if kind == F16:
            return self.fptrunc(value, vec(F16, lanes))
        wide = vec(I32, lanes)
        bits = self.bitcast(value, wide)
        odd = self.and_(self.lshr(bits, const(wide, 16)), const(wide, 1))
        rounded = self.add(bits, self.add(odd, const(wide, 0x7FFF)))
        rounded = self.select(self.fcmp_unordered("uno", value, value), const(wide, 0x7FC00000), rounded)
        return self.trunc(self.lshr(rounded, const(wide, 16)), vec(I16, lanes))


class Task:
    """Reads fields of a task inside of a kernel; those before the field "tokens" or "rows" as pointers."""

    def __init__(self, b: Emitter, task: Any, fields: Sequence[str]) -> None:
        self._b, self._task, self._fields = b, task, fields
        self._pointers = next(i for i, name in enumerate(fields) if name in ("tokens", "rows"))

    def __getattr__(self, name: str) -> Any:
        index = self._fields.index(name)
        value = self._b.fetch(self._task, const(I64, index), I64, align=8)
        return self._b.inttoptr(value, PTR) if index < self._pointers else value

    def number(self, name: str) -> Any:
        """A float32 whose bits are the field's lower half."""
        return self._b.bitcast(self._b.trunc(getattr(self, name), I32), F32)


def emit_entry(module: ir.Module, parts: Sequence[ir.Function]) -> None:
    """`run(task)`: the parts one after the other, the i-th in as many OpenMP threads as the task's i-th field says."""
    number = ir.Function(module, ir.FunctionType(I32, []), "omp_get_thread_num")
    size = ir.Function(module, ir.FunctionType(I32, []), "omp_get_num_threads")
    fork = ir.Function(module, ir.FunctionType(VOID, [PTR, PTR, I32, I32]), "GOMP_parallel")
    shares = []
    for part in parts:
        b, (task,) = Emitter.define(module, f"{part.name}_share", [PTR], internal=True)
        b.call(part, [task, b.sext(b.call(number, []), I64), b.sext(b.call(size, []), I64)])
        b.ret_void()
        shares.append(b.function)
    b, (task,) = Emitter.define(module, "run", [PTR])
    for i, (part, share) in enumerate(zip(parts, shares)):
        threads = b.fetch(task, const(I64, i), I64, align=8)
        with b.if_else(b.icmp_signed("==", threads, const(I64, 1))) as (alone, together):
            with alone:
                b.call(part, [task, const(I64, 0), const(I64, 1)])
            with together:
                b.call(fork, [share, task, b.trunc(threads, I32), const(I32, 0)])
    b.ret_void()
