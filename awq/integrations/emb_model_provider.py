"""`AutoAWQLoader`: quantized encoders for embedding servers that load models through
`emb_model_provider`'s `BaseModelLoader`.

The host's base class is used when its package is installed, an equal one of our own when not. Only
its constructor, its abstract methods and `cleanup` are relied on; everything else that the host
calls is answered here, because a count of `parameters()` would miss packed weights, which are
buffers.
"""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModel

from awq.checkpoint.load import load_model
from awq.checkpoint.source import Source
from awq.checkpoint.tokenizer import load_tokenizer
from awq.config import METHOD, quant_method
from awq.embed.body import speed_up
from awq.embed.directory import longest_input, sentence_settings
from awq.errors import AwqError, ConfigError
from awq.nn.linear import WQLinear
from awq.nn.locks import lock_of

if TYPE_CHECKING:
    from awq.integrations.base_loader import BaseModelLoader
else:
    try:
        from emb_model_provider.loaders.base_loader import BaseModelLoader
    except ImportError:
        from awq.integrations.base_loader import BaseModelLoader

logger = logging.getLogger("awq.integrations")


class AutoAWQLoader(BaseModelLoader):
    """Loads an AWQ checkpoint as a plain transformers model, whose call gives `last_hidden_state`.
    On a CPU such calls run through the compiled program where it gives the same (`embed.body`).

    model_name: local directory or hub id. model_path: local directory, preferred when given.
    device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N". dtype: of everything that is
    not packed; "auto" is what the checkpoint was saved in. cache_dir, revision, token,
    local_files_only: for the hub. Other keyword arguments go to the host's base class. Raises
    ConfigError for arguments that cannot work, before anything is loaded.
    """

    def __init__(
        self,
        model_name: str,
        model_path: str | None = None,
        trust_remote_code: bool = False,
        *,
        device: str = "auto",
        dtype: Any = "auto",
        **kwargs: Any,
    ) -> None:
        given = model_path if model_path is not None else model_name
        if not isinstance(given, (str, Path)) or not str(given).strip():
            raise ConfigError(
                f"model_name is {model_name!r} and model_path {model_path!r}; give a local "
                "directory or a hub id."
            )

        # By keyword: older hosts have cache_dir before trust_remote_code.
        super().__init__(
            model_name=model_name,
            model_path=model_path,
            trust_remote_code=trust_remote_code,
            **kwargs,
        )
        self._source = str(given)
        self._trust = trust_remote_code
        self._dtype = dtype
        self._hub = {
            k: kwargs[k]
            for k in ("cache_dir", "revision", "token", "local_files_only")
            if kwargs.get(k) is not None
        }
        self._device = device
        self._model: Any = None
        self._tokenizer: Any = None
        self.model: Any = None
        self.tokenizer: Any = None
        self.get_device()

    def get_device(self, device: str | None = None) -> str:
        """The device that `device` (None: the loader's own) means on this machine. Raises
        ConfigError when it has none such."""
        wanted = str(device if device is not None else self._device)
        if wanted == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"

        kind, _, index = wanted.partition(":")
        if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
            raise ConfigError(f'device is {wanted!r}; use "auto", "cpu", "cuda" or "cuda:N".')
        if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"device is {wanted!r}, but torch sees {torch.cuda.device_count()} GPUs; use "
                '"auto" or "cpu".'
            )
        return wanted

    def load_model(self) -> tuple[Any, Any]:
        """(model in evaluation mode on its device, tokenizer); the same pair when called again.

        Raises ModelError when there is no such model or tokenizer, CheckpointError when its files
        are broken, ConfigError when it is not quantized.
        """
        # several requests may be the first: one loads, the others wait and get the same pair
        with lock_of(self):
            if self._model is None:
                self._load()
            return self._model, self._tokenizer

    def _load(self) -> None:
        if not self._is_quantized():
            raise ConfigError(
                f"{self._source} is not an AWQ checkpoint: its config has no such "
                "quantization_config; quantize it first "
                f"(awq quantize {self._source} OUTPUT) or use the host's loader for "
                "full-precision models."
            )

        tokenizer = load_tokenizer(self._source, self._trust, **self._hub)
        model = load_model(self._source, self._dtype, self._trust, AutoModel, **self._hub)
        self._model = model.to(self.get_device()).eval()
        self._tokenizer = tokenizer
        if self.get_device() == "cpu":
            speed_up(self._model)

        # where a host's own methods look for them
        self.model = self._model
        self.tokenizer = self._tokenizer

    def is_model_available(self) -> bool:
        """Whether an AWQ checkpoint with readable files is there; the reason is logged when it is
        not."""
        try:
            return self._is_quantized()
        except AwqError as error:
            logger.info("%s", error)
            return False

    def get_model_info(self) -> dict[str, Any]:
        """What the host shows of a model; sizes are None as long as the model's config cannot be
        read."""
        info = {
            "model_name": self.model_name,
            "model_path": self._source,
            "device": self.get_device(),
            "loaded": self._model is not None,
            "loader": type(self).__name__,
            "source": "local" if Path(self._source).is_dir() else "huggingface",
            "max_context_length": None,
            "embedding_dimension": None,
            "vocab_size": None,
            "model_type": None,
        }
        try:
            config = self._config()
            tokenizer = self._tokenizer or load_tokenizer(self._source, self._trust, **self._hub)
        except AwqError as error:
            return info | {"error": str(error)}

        length = longest_input(config, tokenizer, sentence_settings(self._source))
        sizes = {
            "embedding_dimension": config.hidden_size,
            "vocab_size": config.vocab_size,
            "model_type": config.model_type,
        }

        return (
            info
            | sizes
            | {"max_context_length": length, "parameters": self.get_model_size() or None}
        )

    def get_model_size(self) -> int:
        """Number of parameters of the loaded model, packed ones included; 0 before `load_model`."""
        return 0 if self._model is None else parameter_count(self._model)

    @torch.no_grad()
    def validate_model(self) -> bool:
        """Whether the model, loaded if need be, gives finite hidden states for a sentence; the
        reason is logged when not."""
        try:
            model, tokenizer = self.load_model()
            tokens = tokenizer("Hello, world!", return_tensors="pt").to(model.device)
            hidden = model(**tokens).last_hidden_state
        except (AwqError, RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            logger.error("%s cannot be used: %s", self._source, error)
            return False

        finite = bool(torch.isfinite(hidden).all())
        if not finite:
            logger.error("%s gives hidden states that are not finite.", self._source)
        return finite and hidden.shape[:2] == tokens["input_ids"].shape

    def cleanup(self) -> None:
        """Lets go of model and tokenizer and returns GPU memory; `load_model` loads again."""
        super().cleanup()
        with lock_of(self):
            self._model = self._tokenizer = None
            self.model = self.tokenizer = None

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __enter__(self) -> AutoAWQLoader:
        return self

    def __exit__(self, *_error: Any) -> None:
        self.cleanup()

    def _config(self) -> Any:
        return Source.open(self._source, self._trust, **self._hub).config

    def _is_quantized(self) -> bool:
        stored = getattr(self._config(), "quantization_config", None)
        return quant_method(stored) == METHOD


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model as before quantization: a packed linear counts in_features ×
    out_features, and its bias."""
    dense = sum(p.numel() for p in model.parameters())
    packed = [m for m in model.modules() if isinstance(m, WQLinear)]
    return dense + sum(
        m.in_features * m.out_features + (0 if m.bias is None else m.bias.numel()) for m in packed
    )
