"""Quantization arithmetic: pure tensor functions, tensors in and tensors out; no devices, no logging, no modules."""
