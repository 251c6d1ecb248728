"""`Value` and `Pointer`: what kernels compute with, so that they read like the arithmetic they do.

A `Value` is a number, or a vector of numbers, that exists when the kernel runs. Its operators
append instructions to the
kernel: `(first + p) * width` is an `add` and a `mul`. Python's numbers may stand on either side.
Integers are signed.

    +  -  *        on integers and floats
    //  %  <<  &   on integers;  >> keeps the sign, `shift_right` brings zeros in
    /              on floats
    <  <=  >  >=   give an int1; `equals` and `differs` too, since Python needs == for itself

A `Pointer` knows the type it points to. `p[i]` reads, `p[i] = v` writes, `p + i` is the pointer
that many elements further, `p.vector(i, lanes)` reads neighbours. Nothing is checked when a kernel
runs: an index beyond the end is a segmentation fault.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Union

from llvmlite import ir

from awq.kernels.cpu.ir_types import I64, const, is_float, vec

if TYPE_CHECKING:
    from awq.kernels.cpu.emit import Emitter

Number = Union["Value", int, float]


class Value:
    """A number or a vector of them at run time. b: the `Emitter` that its operators append to; ir:
    llvmlite's value."""

    __slots__ = ("b", "ir")

    def __init__(self, b: Emitter, value: ir.Value) -> None:
        self.b = b
        self.ir = value

    @property
    def type(self) -> ir.Type:
        return self.ir.type

    def _binary(self, left: Number, right: Number, for_ints: str, for_floats: str | None) -> Value:
        name = for_floats if is_float(self.type) else for_ints
        if name is None:
            raise TypeError(f"this operator is not for values of type {self.type}")

        operands = [
            side.ir if isinstance(side, Value) else const(self.type, side) for side in (left, right)
        ]
        return Value(self.b, getattr(self.b.builder, name)(*operands))

    def __add__(self, other: Number) -> Value:
        return self._binary(self, other, "add", "fadd")

    def __radd__(self, other: float) -> Value:
        return self._binary(other, self, "add", "fadd")

    def __sub__(self, other: Number) -> Value:
        return self._binary(self, other, "sub", "fsub")

    def __rsub__(self, other: float) -> Value:
        return self._binary(other, self, "sub", "fsub")

    def __mul__(self, other: Number) -> Value:
        return self._binary(self, other, "mul", "fmul")

    def __rmul__(self, other: float) -> Value:
        return self._binary(other, self, "mul", "fmul")

    def __floordiv__(self, other: Number) -> Value:
        return self._binary(self, other, "sdiv", None)

    def __mod__(self, other: Number) -> Value:
        return self._binary(self, other, "srem", None)

    def __truediv__(self, other: Number) -> Value:
        return self._binary(self, other, "", "fdiv")

    def __rtruediv__(self, other: float) -> Value:
        return self._binary(other, self, "", "fdiv")

    def __and__(self, other: Number) -> Value:
        return self._binary(self, other, "and_", None)

    def __lshift__(self, other: Number) -> Value:
        return self._binary(self, other, "shl", None)

    def __rshift__(self, other: Number) -> Value:
        return self._binary(self, other, "ashr", None)

    def shift_right(self, bits: int) -> Value:
        """Shifted right, with zeros from the left."""
        return self._binary(self, bits, "lshr", None)

    def __neg__(self) -> Value:
        builder = self.b.builder
        return Value(self.b, builder.fneg(self.ir) if is_float(self.type) else builder.neg(self.ir))

    def _compare(self, operator: str, other: Number) -> Value:
        right = other.ir if isinstance(other, Value) else const(self.type, other)
        builder = self.b.builder
        ordered = builder.fcmp_unordered if operator in ("==", "!=") else builder.fcmp_ordered
        compare = ordered if is_float(self.type) else builder.icmp_signed
        return Value(self.b, compare(operator, self.ir, right))

    def __lt__(self, other: Number) -> Value:
        return self._compare("<", other)

    def __le__(self, other: Number) -> Value:
        return self._compare("<=", other)

    def __gt__(self, other: Number) -> Value:
        return self._compare(">", other)

    def __ge__(self, other: Number) -> Value:
        return self._compare(">=", other)

    def equals(self, other: Number) -> Value:
        """Whether both are the same number; NaN equals everything."""
        return self._compare("==", other)

    def differs(self, other: Number) -> Value:
        """Whether they are different numbers; NaN differs from everything."""
        return self._compare("!=", other)


class Pointer:
    """An address of elements of one type. Indices count elements."""

    __slots__ = ("b", "element", "ir")

    def __init__(self, b: Emitter, address: ir.Value, element: ir.Type) -> None:
        self.b = b
        self.ir = address
        self.element = element

    def __add__(self, index: Number) -> Pointer:
        offset = index.ir if isinstance(index, Value) else const(I64, index)
        return Pointer(
            self.b, self.b.builder.gep(self.ir, [offset], source_etype=self.element), self.element
        )

    def __getitem__(self, index: Number) -> Value:
        return self.load(index)

    def __setitem__(self, index: Number, value: Value) -> None:
        self.b.builder.store(value.ir, (self + index).ir, align=1)

    def load(self, index: Number, align: int = 1) -> Value:
        """The element at index. align: what the address is a multiple of, in bytes."""
        return Value(self.b, self.b.builder.load((self + index).ir, typ=self.element, align=align))

    def load_as(self, type: ir.Type, align: int = 1) -> Value:
        """What lies here, read as another type."""
        return Value(self.b, self.b.builder.load(self.ir, typ=type, align=align))

    def vector(self, index: Number, lanes: int) -> Value:
        """`lanes` neighbours from index on."""
        return Value(
            self.b, self.b.builder.load((self + index).ir, typ=vec(self.element, lanes), align=1)
        )

    def floats(self, index: Number, lanes: int) -> Value:
        """`lanes` neighbours from index on, as float32."""
        return self.b.to_float(self.vector(index, lanes))

    def put_floats(self, index: Number, value: Value) -> None:
        """Writes a vector of float32 from index on, rounded to the pointer's type."""
        self[index] = self.b.from_float(value, self.element)

    def is_given(self) -> Value:
        """Whether the caller passed a tensor and not None."""
        return Value(self.b, self.b.builder.ptrtoint(self.ir, I64)).differs(0)


class Variable:
    """A place that is written more than once; LLVM keeps it in a register. Read and write its
    `value`."""

    __slots__ = ("_address", "_b", "_type")

    def __init__(self, b: Emitter, address: ir.Value, type: ir.Type) -> None:
        self._b = b
        self._address = address
        self._type = type

    @property
    def value(self) -> Value:
        return Value(self._b, self._b.builder.load(self._address, typ=self._type))

    @value.setter
    def value(self, value: Value) -> None:
        self._b.builder.store(value.ir, self._address)
