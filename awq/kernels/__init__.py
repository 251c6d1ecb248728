"""Products with 4-bit weights: `torch.library` ops over a table of backends; the reference is the
specification.

`quantized_linear` is one linear; `moe_linear` the linears of a mixture of experts, of which each
token takes its own few.
"""

from awq.backends import choose, explain, layout_for, reasons, use_backend
from awq.kernels.moe import moe_linear, stack_experts
from awq.kernels.op import quantized_linear
from awq.kernels.packed import Packed, Shape

__all__ = [
    "Packed",
    "Shape",
    "choose",
    "explain",
    "layout_for",
    "moe_linear",
    "quantized_linear",
    "reasons",
    "stack_experts",
    "use_backend",
]
