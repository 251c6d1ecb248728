"""Products with 4-bit weights: one `torch.library` op over a table of backends; the reference is the specification."""

from awq.kernels.backends import choose, explain, layout_for, reasons, use_backend
from awq.kernels.op import quantized_linear
from awq.kernels.packed import Packed, Shape

__all__ = ["Packed", "Shape", "choose", "explain", "layout_for", "quantized_linear", "reasons", "use_backend"]
