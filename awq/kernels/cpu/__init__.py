"""The CPU backend: kernels generated for the CPU at hand, by llvmlite, with no compiler on the
machine (`autoawq[cpu]`).

Weights stay nibbles; activations become integers, per group of inputs, in planes of int8; products
are exact integers, and everything else is float32. Two planes (16 bits) serve bfloat16 and float16,
three (24 bits) float32: each comes out as exact as its own dtype is. At one token the planes are
nearly free, since memory is what limits. `cpu_int8` is the same with one plane,
as llama.cpp and onnxruntime compute: twice as fast for many tokens, and off by 0.5 %.

Kernels: `products`, `decoding`, and `dense` for many bfloat16 tokens where the CPU has a matrix
unit; what each kind of CPU has: `targets`; compiling and threads: `engine`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from awq.kernels.cpu.engine import binding, host_target
from awq.kernels.packed import Packed, Shape
from awq.kernels.trial import trial_error

if TYPE_CHECKING:
    from awq.kernels.cpu.product_launch import Product

LAYOUT = "rows16"
OPERATORS = dict.fromkeys(
    ("add_norm", "activate", "attend", "dense"), "awq.kernels.cpu.decode_launch"
)
MATRIX_UNIT_MIN_TOKENS = 128  # fewer are not worth a dense weight
PLANES = {torch.float32: 3, torch.bfloat16: 2, torch.float16: 2}
# of the trial product by planes, beside the rounding of its dtype
_TOLERANCE = {1: 2e-2, 2: 2e-4, 3: 1e-6}


def why_not(
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape | None,
    planes: int | None = None,
) -> str | None:
    """Why these kernels cannot serve this linear; see `awq.backends`."""
    if device.type != "cpu":
        return f"it runs on CPUs, and the weights are on {device.type}"
    if dtype not in PLANES:
        return f"activations are {dtype}; it takes float16, bfloat16 and float32"
    if shape is not None and shape.group_size % 8:
        return f"group_size {shape.group_size} is not a multiple of 8"
    return problem(dtype, planes or PLANES[dtype])


@cache
def problem(dtype: torch.dtype, planes: int) -> str | None:
    """Why the kernels cannot be trusted in this process: nothing to compile with, an unknown CPU,
    or wrong results."""
    try:
        binding()
        if host_target() is None:
            return "the CPU has no AVX2, AVX-512 or Arm dot products"
        compute = product(dtype, planes)
        error = trial_error(lambda x, packed: compute(x, packed, None), LAYOUT, dtype, (1, 7))
    except ImportError as failure:
        return str(failure)
    except Exception as failure:  # LLVM refuses in many ways, and a linear must still be computed
        return (
            f"llvmlite cannot compile for this CPU: {type(failure).__name__} "
            f"{str(failure).split(chr(10))[0]}"
        )

    allowed = _TOLERANCE[planes] + torch.finfo(dtype).eps
    return None if error < allowed else f"a trial product was wrong by {error:.3g}"


@cache
def product(dtype: torch.dtype, planes: int) -> Product:
    """What computes products for activations of `dtype`. Raises ImportError or what LLVM raises."""
    from awq.kernels.cpu import product_launch

    return product_launch.product(dtype, planes)


def linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x [..., in] → [..., out] in x's dtype."""
    if (
        x.dtype == torch.bfloat16
        and has_matrix_unit()
        and x.numel() >= MATRIX_UNIT_MIN_TOKENS * packed.shape.in_features
    ):
        from awq.kernels.cpu import dense

        return dense.linear(x, packed, bias)
    return product(x.dtype, PLANES[x.dtype])(x, packed, bias)


@cache
def has_matrix_unit() -> bool:
    """Whether this CPU multiplies tiles of bfloat16, and a trial of it is right."""
    if not binding().get_host_cpu_features().get("amx-bf16"):
        return False

    from awq.kernels.cpu import dense

    try:
        tokens = (MATRIX_UNIT_MIN_TOKENS,)
        return (
            trial_error(
                lambda x, packed: dense.linear(x, packed, None), LAYOUT, torch.bfloat16, tokens
            )
            < 1e-2
        )
    except Exception:  # as in `problem`; the other kernels serve
        return False
