"""AutoAWQ's entry points: thin, all logic is below."""

from awq.models.auto import AutoAWQForCausalLM, AutoAWQForEmbedding
from awq.models.base import AwqModel, BaseAWQForCausalLM

__all__ = ["AutoAWQForCausalLM", "AutoAWQForEmbedding", "AwqModel", "BaseAWQForCausalLM"]
