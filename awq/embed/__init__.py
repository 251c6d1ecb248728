"""Sentence embeddings from encoders, quantized or not."""
