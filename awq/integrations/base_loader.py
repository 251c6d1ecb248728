"""Stands in for `emb_model_provider`'s `BaseModelLoader` where that package is not installed: the
same arguments and methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class BaseModelLoader(ABC):
    """What an embedding server asks of a loader. Further keyword arguments are kept in
    `options`."""

    def __init__(
        self,
        model_name: str,
        model_path: str | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        self.model_name = model_name
        self.model_path = model_path
        self.trust_remote_code = trust_remote_code
        self.options = kwargs

    @abstractmethod
    def load_model(self) -> tuple[Any, Any]:
        """(model, tokenizer)."""

    @abstractmethod
    def is_model_available(self) -> bool:
        """Whether `load_model` would find the model."""

    @abstractmethod
    def get_model_info(self) -> dict[str, Any]:
        """model_name, model_path, device, loaded, loader, source, max_context_length,
        embedding_dimension, …"""

    def cleanup(self) -> None:  # noqa: B027
        """Frees what the loader holds."""
