"""`AwqModel`: a plain transformers model that can be quantized, packed and saved."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from awq.calibration import load_calibration
from awq.calibration.batches import with_general_rows
from awq.calibration.request import read_request, tell_apart
from awq.calibration.samples import media_batches, media_samples, tokenizer_of
from awq.checkpoint import save_checkpoint
from awq.checkpoint.hf import mark_quantized
from awq.checkpoint.hub import check_push, push_directory
from awq.checkpoint.source import position_limit
from awq.checkpoint.streaming import StreamedBlocks
from awq.checkpoint.tokenizer import find_processor, find_tokenizer
from awq.config import AwqConfig
from awq.errors import ConfigError, ModelError
from awq.models.arguments import check_streamed, quantize_options
from awq.nn.blocks import find_block_lists
from awq.nn.copies import copy_structure
from awq.nn.decoder_inputs import start_token
from awq.nn.expert_shape import fused_experts
from awq.nn.layout import restore
from awq.nn.linear import WQLinear
from awq.nn.locks import lock_of
from awq.nn.surgery import (
    device_of,
    get_weight,
    named_linears,
    output_head,
    replace_module,
    usable_device,
)
from awq.nn.unfinished import check_finished, unfinished
from awq.quantize import QuantizeOptions, QuantReport, quantize_model
from awq.quantize.checks import check_quantizable
from awq.quantize.match import Embed
from awq.quantize.plan import make_plan

logger = logging.getLogger("awq.models")

# of the input's error: encoders bear more than the presets' 0.5, made for language models
ENCODER_CORRECTION = 0.75
_SAMPLES = 128  # rows of text that calibrate, AutoAWQ's number


class AwqModel(nn.Module):
    """A transformers model (`.model`) that can be quantized, packed and saved.

    Attributes it does not have itself are the transformers model's. What it can do beyond that is a
    matter of its kind: `BaseAWQForCausalLM` generates, `AwqEmbeddingModel` embeds.
    """

    def __init__(
        self,
        model: Any,
        path: str,
        config: AwqConfig | None = None,
        tokenizer: Any = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.path = path
        self.config = model.config
        self.model_type = model.config.model_type
        self.awq_config = config or AwqConfig()
        self.is_quantized = config is not None
        self.report: QuantReport | None = None
        self._tokenizer = tokenizer
        self._tokenizer_known = self.is_quantized
        self._trust_remote_code = trust_remote_code

        # packed linears of an export_compatible run, until pack()
        self._blocks: StreamedBlocks | None = None  # of a model that is not in memory
        self._waiting: dict[str, WQLinear] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or name == "model":
                raise
            return getattr(super().__getattr__("model"), name)

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def quant_config(self) -> AwqConfig:
        return self.awq_config

    @property
    def tokenizer(self) -> Any:
        """The tokenizer beside the model, loaded when first asked for; None when there is none."""
        if not self._tokenizer_known:
            self.tokenizer = find_tokenizer(self.path, self._trust_remote_code)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self._tokenizer = value
        self._tokenizer_known = True

    @cached_property
    def processor(self) -> Any:
        """The processor beside a model that takes images or sound, loaded when first asked for;
        None for models of text."""
        return find_processor(self.path, self._trust_remote_code)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The transformers model's own forward: `.logits` of a language model, `.last_hidden_state`
        of an encoder."""
        return self.model(*args, **kwargs)

    def _quantize(
        self,
        tokenizer: Any,
        quant_config: Mapping[str, Any] | AwqConfig | None,
        calib_data: Any,
        *,
        split: str,
        text_column: str,
        max_calib_samples: int | None,
        max_calib_seq_len: int,
        export_compatible: bool = False,
        general_texts: bool = False,
        **options: Any,
    ) -> QuantReport:
        """What `quantize` of every kind of model does; arguments are those of
        `BaseAWQForCausalLM.quantize`."""
        self._check_whole()
        if self.is_quantized or self._waiting:
            raise ConfigError(
                f"the model from {self.path} is quantized already; start from the full-precision "
                "model."
            )

        if not self._is_decoder() and options.get("correction") is None:
            options["correction"] = ENCODER_CORRECTION
        config, chosen = self._checked(
            quant_config, max_calib_samples, max_calib_seq_len, export_compatible, **options
        )
        general = general_texts and chosen.rounding == "feedback"
        batches = self._calibration(
            tokenizer, calib_data, split, text_column, max_calib_samples, max_calib_seq_len, general
        )

        if export_compatible:
            report = self._quantize_dense(batches, config, chosen)
        else:
            report = quantize_model(
                self.model, batches, config, chosen, self._blocks, self._embedding()
            )

        self.report = report
        self.awq_config = config
        self.is_quantized = not export_compatible
        if self.is_quantized:
            mark_quantized(self.model, config)

        return report

    def _embedding(self) -> Embed | None:
        """What makes embeddings of the model's hidden states; None where hidden states are the
        result."""
        return None

    def _check_whole(self) -> None:
        """Refuses a model whose quantization was interrupted: some of its blocks are quantized, and
        one may be neither."""
        check_finished(self.model, self.path)

    def _checked(
        self,
        quant_config: Any,
        samples: int | None,
        tokens: int,
        export_compatible: bool = False,
        **options: Any,
    ) -> tuple[AwqConfig, QuantizeOptions]:
        """Settings that fit this model. Raises ConfigError before any text is fetched, tokenized or
        embedded."""
        if isinstance(quant_config, AwqConfig):
            config = quant_config
        else:
            config = AwqConfig.from_dict(quant_config)

        chosen = quantize_options(options)
        for name, value in (("max_calib_samples", samples), ("max_calib_seq_len", tokens)):
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise ConfigError(f"{name} is {value!r}; use a whole number of at least 1.")

        if chosen.device is not None:
            usable_device(chosen.device)
        if self._blocks is not None:
            check_streamed(chosen, export_compatible)
        check_quantizable(self.model, config, self.path, streamed=self._blocks is not None)

        if not fused_experts(self.model):  # experts are made linears later, and count in the plan
            with suppress(ModelError):  # a model without blocks is judged later
                lists = find_block_lists(self.model)
                if len(lists) == 1:  # of several, calibration tells which are quantized
                    make_plan(self.model, lists, config, packed=not export_compatible)

        return config, chosen

    def _calibration(
        self,
        first: Any,
        data: Any,
        split: str,
        text_column: str,
        samples: int | None,
        tokens: int,
        general: bool,
    ) -> list:
        decoder = self._is_decoder()
        data, processor = tell_apart(first, data)
        tokenizer = tokenizer_of(processor)
        media = media_samples(data)
        if media is not None:
            return media_batches(
                media[: samples or _SAMPLES], processor, self._inputs(), start_token(self.model)
            )

        if tokenizer is not None and not self._tokenizer_known:
            self.tokenizer = tokenizer
        pad_id = self._pad_id() if tokenizer is None else getattr(tokenizer, "pad_token_id", None)
        request = read_request(
            data,
            split=split,
            text_column=text_column,
            text_per_line=not decoder,
            pad_id=pad_id,
            limit=(samples or _SAMPLES) * 8,
        )
        if tokenizer is not None or request.kind != "ids":
            request = request.with_tokenizer(self.tokenizer if tokenizer is None else tokenizer)
        # token ids are the caller's own choice of samples: all of them are used
        if samples is None:
            samples = max(_SAMPLES, len(request.rows))

        batches = load_calibration(
            request,
            request.tokenizer,
            max_samples=samples,
            max_length=self._limit(tokens),
            mode="pack" if decoder else "rows",
            pad_id=pad_id,
        )
        if decoder and general and request.own and request.kind != "ids":
            batches = with_general_rows(batches, request.tokenizer, samples)
        accepted = self._inputs()

        # A tokenizer may tell the texts of a pair apart for a model that does not.
        return [
            b._replace(extra={k: v for k, v in b.extra.items() if k in accepted}) for b in batches
        ]

    def _inputs(self) -> Collection[str]:
        """Names of what the model's body takes."""
        body = getattr(self.model, "base_model", self.model)
        return inspect.signature(body.forward).parameters

    def _quantize_dense(
        self,
        batches: list,
        config: AwqConfig,
        options: QuantizeOptions,
    ) -> QuantReport:
        """Leaves ordinary linears with quantized values; `pack` can pack them later, exactly."""
        dense = named_linears(self.model)
        dtype = self.model.dtype
        report = quantize_model(self.model, batches, config, options, embed=self._embedding())
        report.options["export_compatible"] = True

        with unfinished(self.model):
            for name, linear in dense.items():  # two of them may have become one packed linear
                packed = self.model.get_submodule(name)
                if isinstance(packed, WQLinear):
                    get_weight(linear).copy_(packed.dequantize())
                    replace_module(self.model, name, linear.to(self.device, dtype))
                    self._waiting[name] = packed

        return report

    def pack(self) -> None:
        """Packs the weights after `quantize(export_compatible=True)`, exactly as quantized."""
        if self.is_quantized:
            logger.info("pack: the weights are packed already.")
            return
        if not self._waiting:
            raise ConfigError("pack() needs quantize(..., export_compatible=True) before it.")

        for name, packed in self._waiting.items():
            replace_module(self.model, name, packed.to(self.device))
        self._waiting = {}
        self.is_quantized = True
        mark_quantized(self.model, self.awq_config)

    def save_quantized(
        self,
        save_dir: str | Path,
        safetensors: bool = True,
        shard_size: str | int = "5GB",
    ) -> None:
        """Saves the model with its tokenizer and companion files, a report and a model card.

        Raises ConfigError when nothing was quantized, CheckpointError when writing fails.
        """
        self._check_whole()
        if not self.is_quantized and self.report is None:
            raise ConfigError("the model is not quantized; call quantize() first.")

        if not safetensors:
            logger.warning("safetensors=False is ignored: weights are written as safetensors only.")
        save_checkpoint(
            self._as_saved(),
            save_dir,
            self.awq_config,
            self.report,
            self.path,
            self._tokenizer,
            shard_size,
            self.is_quantized,
            None if self._blocks is None else self._blocks.parts(),
        )

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "4-bit AWQ weights",
        private: bool = False,
        token: str | None = None,
        shard_size: str | int = "5GB",
    ) -> str:
        """Sends what `save_quantized` writes to a repository of the hub; returns the commit's
        address.

        repo_id: "owner/name"; made when there is none. private: of a new repository. token:
        default: the one that `hf auth login` stored, or HF_TOKEN. Raises ConfigError and
        CheckpointError as `push_directory` does.
        """
        check_push(repo_id, token)
        with TemporaryDirectory() as folder:
            saved = Path(folder) / repo_id.rpartition("/")[2]
            self.save_quantized(saved, shard_size=shard_size)
            return push_directory(
                saved, repo_id, private=private, token=token, commit_message=commit_message
            )

    def _as_saved(self) -> Any:
        """What a save reads: the model's tensors in modules of its own, so that calls may go on
        while it is written."""
        if any(tensor.is_meta for tensor in (*self.model.parameters(), *self.model.buffers())):
            # offloaded: accelerate's hooks know where the weights are, and nothing is fused
            return self.model

        with lock_of(self.model):
            model = copy_structure(self.model)
        restore(model)

        return model

    def _is_decoder(self) -> bool:
        can_generate = getattr(self.model, "can_generate", lambda: False)
        return output_head(self.model) is not None and can_generate()

    def _limit(self, tokens: int) -> int:
        longest = position_limit(self.config)
        # RoBERTa numbers its positions from pad_token_id + 1, so its table is a little longer than
        # its inputs may be.
        if longest is not None and longest > 2:
            return min(tokens, longest - 2)
        return tokens

    def _pad_id(self) -> int | None:
        if not self._is_decoder():
            return getattr(self.config, "pad_token_id", None)
        return None
