"""AutoAWQ's entry points: thin, all logic is below."""

from awq.models.auto import AutoAWQForCausalLM, AutoAWQForEmbedding
from awq.models.base import AwqModel, BaseAWQForCausalLM
from awq.models.embedding import AwqEmbeddingModel

__all__ = [
    "AutoAWQForCausalLM",
    "AutoAWQForEmbedding",
    "AwqEmbeddingModel",
    "AwqModel",
    "BaseAWQForCausalLM",
]
