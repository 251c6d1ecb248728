"""Compiled encoders without torch: what runs them needs numpy, llvmlite's loader and tokenizers."""
