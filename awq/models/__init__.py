"""AutoAWQ's entry points: thin, all logic is below."""

from awq.models.auto import AutoAWQForCausalLM, AutoAWQForEmbedding
from awq.models.base import BaseAWQForCausalLM
from awq.models.embedding import AwqEmbeddingModel
from awq.models.model import AwqModel

__all__ = [
    "AutoAWQForCausalLM",
    "AutoAWQForEmbedding",
    "AwqEmbeddingModel",
    "AwqModel",
    "BaseAWQForCausalLM",
]
