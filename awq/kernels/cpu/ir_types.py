"""LLVM's types as the kernels name them, and constants of them."""

from __future__ import annotations

from llvmlite import ir

from awq.kernels.cpu.targets import LANES

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16 = ir.HalfType()
F32 = ir.FloatType()
PTR = ir.PointerType()
VOID = ir.VoidType()

# The types of activations by torch's names. LLVM's own bfloat16 is not used: half of the CPUs have
# no instruction for it.
ELEMENTS = {"float32": F32, "float16": F16, "bfloat16": I16}


def vec(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def const(type: ir.Type, value: float) -> ir.Constant:
    """A constant; of a vector type: that value in every lane."""
    if isinstance(type, ir.VectorType):
        return ir.Constant(type, [ir.Constant(type.element, value)] * type.count)
    return ir.Constant(type, value)


def is_float(type: ir.Type) -> bool:
    """Whether a type is a float or a vector of floats."""
    element = type.element if isinstance(type, ir.VectorType) else type
    return isinstance(element, (ir.HalfType, ir.FloatType, ir.DoubleType))


def lanes_of(type: ir.Type) -> int:
    """The lanes of a vector type; 0 for a scalar type."""
    return type.count if isinstance(type, ir.VectorType) else 0
