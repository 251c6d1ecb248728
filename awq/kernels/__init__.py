"""Products with 4-bit weights: one `torch.library` op in front of a table of backends; the reference is the specification."""

from awq.kernels.op import quantized_linear

__all__ = ["quantized_linear"]
