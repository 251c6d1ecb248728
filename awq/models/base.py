"""`BaseAWQForCausalLM`: the object AutoAWQ users hold, around a plain transformers model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from awq.calibration import load_calibration
from awq.checkpoint import save_checkpoint
from awq.config import AwqConfig
from awq.errors import AwqError, ConfigError
from awq.quantize import QuantizeOptions, QuantReport, quantize_model

logger = logging.getLogger("awq.models")


class BaseAWQForCausalLM(nn.Module):
    """A transformers model (`.model`) with AutoAWQ's `quantize`, `save_quantized`, `pack` and `generate`."""

    def __init__(self, model: nn.Module, path: str, config: AwqConfig | None = None, tokenizer: Any = None) -> None:
        super().__init__()
        self.model = model
        self.path = path
        self.tokenizer = tokenizer
        self.config = model.config
        self.model_type = model.config.model_type
        self.awq_config = config or AwqConfig()
        self.is_quantized = config is not None
        self.report: QuantReport | None = None

    @property
    def device(self) -> torch.device:
        return next(iter(self.model.state_dict().values())).device

    @property
    def quant_config(self) -> AwqConfig:
        return self.awq_config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The transformers model's own forward: `.logits` of a language model, `.last_hidden_state` of an encoder."""
        return self.model(*args, **kwargs)

    @torch.inference_mode()
    def generate(self, *args: Any, max_seq_len: int | None = None, **kwargs: Any) -> Tensor:
        """transformers' generate; max_seq_len is the total length, prompt included (AutoAWQ's name for max_length)."""
        if not hasattr(self.model, "generate") or self.model.get_output_embeddings() is None:
            raise ConfigError(f"{type(self.model).__name__} is no language model; call it for last_hidden_state instead.")
        if max_seq_len is not None and "max_length" not in kwargs and "max_new_tokens" not in kwargs:
            kwargs["max_length"] = max_seq_len
        return self.model.generate(*args, **kwargs)

    def quantize(
        self,
        tokenizer: Any = None,
        quant_config: dict | None = None,
        calib_data: Any = "pileval",
        split: str = "train",
        text_column: str = "text",
        duo_scaling: bool = True,
        export_compatible: bool = False,
        apply_clip: bool = True,
        n_parallel_calib_samples: int | None = None,
        max_calib_samples: int = 128,
        max_calib_seq_len: int = 512,
        max_chunk_memory: int = 1 << 30,
        quantizer_cls: Any = None,
        preset: str = "balanced",
        **options: Any,
    ) -> QuantReport:
        """Quantizes the model in place and returns the report.

        tokenizer: a tokenizer, or calibration token ids ([samples, tokens] tensor, or a list of id tensors of any lengths).
        quant_config: {"zero_point", "q_group_size", "w_bit", "version", "modules_to_not_convert"}. The other arguments are
        AutoAWQ's; n_parallel_calib_samples, max_chunk_memory and quantizer_cls are accepted and not needed. options: fields of
        `QuantizeOptions`. Raises ConfigError, CalibrationError or ModelError before any weight is touched.
        """
        if self.is_quantized:
            raise ConfigError(f"the model from {self.path} is quantized already; start from the full-precision model.")
        config = AwqConfig.from_dict(quant_config)
        unknown = sorted(set(options) - set(QuantizeOptions.__dataclass_fields__))
        if unknown:
            raise ConfigError(f"quantize() does not know {', '.join(unknown)}.")
        chosen = QuantizeOptions(
            preset=preset, duo_scaling=duo_scaling, clip=apply_clip, export_compatible=export_compatible, **options
        )
        if _is_token_data(tokenizer):
            calib_data, tokenizer = tokenizer, None
            # Token ids are the caller's own choice of samples: all of them are used.
            max_calib_samples = max(max_calib_samples, len(calib_data))
        decoder = self._is_decoder()
        batches = load_calibration(
            calib_data, tokenizer, split=split, text_column=text_column, max_samples=max_calib_samples,
            max_length=self._limit(max_calib_seq_len), mode="pack" if decoder else "rows",
            pad_id=getattr(tokenizer, "pad_token_id", None) if tokenizer is not None else self._pad_id(),
        )  # fmt: skip
        self.report = quantize_model(self.model, batches, config, chosen)
        self.awq_config, self.is_quantized = config, not export_compatible
        return self.report

    def pack(self) -> None:
        """Packs after `quantize(export_compatible=True)`; kept for AutoAWQ's two-step use."""
        raise AwqError("pack() after export_compatible=True is not supported yet; call quantize without export_compatible.")

    def save_quantized(self, save_dir: str, safetensors: bool = True, shard_size: str = "5GB") -> None:
        """Saves the model with its tokenizer and companion files, a report and a model card.

        Raises ConfigError when nothing was quantized, CheckpointError when writing fails.
        """
        if not self.is_quantized and self.report is None:
            raise ConfigError("the model is not quantized; call quantize() first.")
        if not safetensors:
            logger.warning("safetensors=False is ignored: weights are written as safetensors only.")
        save_checkpoint(
            self.model, save_dir, self.awq_config, self.report, self.path, self.tokenizer, shard_size, packed=self.is_quantized
        )

    def _is_decoder(self) -> bool:
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        return head is not None and getattr(self.model, "can_generate", lambda: False)()

    def _limit(self, tokens: int) -> int:
        longest = getattr(self.config, "max_position_embeddings", None) or getattr(self.config, "n_positions", None)
        # RoBERTa numbers its positions from pad_token_id + 1, so its table is a little longer than its inputs may be.
        return min(tokens, longest - 2) if isinstance(longest, int) and longest > 2 else tokens

    def _pad_id(self) -> int | None:
        return getattr(self.config, "pad_token_id", None) if not self._is_decoder() else None


def _is_token_data(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    return isinstance(value, (list, tuple)) and len(value) > 0 and not isinstance(value[0], str)


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a model, or None with a log line."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.info("no tokenizer beside %s: %s", path, str(error).splitlines()[0] if str(error) else error)
        return None
