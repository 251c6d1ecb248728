"""Judging a quantized model: perplexity for language models, cosine drift and rank correlation for
embeddings."""
