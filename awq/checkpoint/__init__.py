"""Saving, loading and converting checkpoints; transformers' own machinery does the work wherever it can."""

from awq.checkpoint.convert import convert_checkpoint
from awq.checkpoint.load import load_model
from awq.checkpoint.save import save_checkpoint

__all__ = ["convert_checkpoint", "load_model", "save_checkpoint"]
