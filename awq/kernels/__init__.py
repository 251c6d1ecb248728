"""Products with 4-bit weights: one `torch.library` op; its only backend so far is the reference, which is the specification."""

from awq.kernels.op import quantized_linear

__all__ = ["quantized_linear"]
