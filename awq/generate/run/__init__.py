"""Carrying out a plan: prompts and steps through fused blocks, inside transformers' own
`generate`."""
