"""Quantization arithmetic: tensors in and tensors out; no logging, no modules. Kernels do the steps
that a GPU starts slowly."""
