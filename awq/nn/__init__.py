"""The quantized linear, and the surgery that swaps it into a transformers model."""
