"""A thin layer over llvmlite's builder: variables, loops, vectors, and floats of three kinds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from awq.kernels.cpu.targets import LANES

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32, PTR, VOID = ir.HalfType(), ir.FloatType(), ir.PointerType(), ir.VoidType()


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
        found = self.module.globals.get(name)
        if found is None:
            found = ir.Function(self.module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.call(found, arguments)

    def math(self, name: str, *arguments: Any) -> Any:
        """LLVM's intrinsic of that name on floats or vectors of them: fma, fabs, rint, maximum …"""
        type = arguments[0].type
        suffix = f"v{type.count}f32" if isinstance(type, ir.VectorType) else "f32"
        return self.intrinsic(f"llvm.{name}.{suffix}", type, arguments)

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
