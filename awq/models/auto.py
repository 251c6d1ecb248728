"""`AutoAWQForCausalLM`, with AutoAWQ's arguments, for language models, encoders and embedding
models alike."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from awq.checkpoint.load import body_class, load_model
from awq.checkpoint.source import HUB_ARGUMENTS, Source, hub_arguments
from awq.checkpoint.streaming import StreamedBlocks
from awq.checkpoint.tokenizer import find_tokenizer
from awq.checkpoint.work_folder import WorkFolder
from awq.config import METHOD, quant_method
from awq.errors import ConfigError, ModelError
from awq.models.base import BaseAWQForCausalLM
from awq.models.embedding import AwqEmbeddingModel
from awq.nn.surgery import usable_device

logger = logging.getLogger("awq.models")

# storage → the config of transformers that undoes it
_DEQUANTIZING = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}


def _dtype(value: Any) -> torch.dtype | str:
    """torch.dtype of a name like "bfloat16" or "torch.bfloat16"; "auto" stays, None becomes
    "auto"."""
    if value is None or value == "auto" or isinstance(value, torch.dtype):
        return "auto" if value is None else value

    found = getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(
            f'torch_dtype is {value!r}; use "auto", "bfloat16", "float16" or "float32".'
        )
    return found


class AutoAWQForCausalLM:
    """Factory; not instantiated."""

    _wrapper: Any = BaseAWQForCausalLM

    @classmethod
    def _wrapper_of(cls, source: Source) -> Any:
        """A sentence-transformers directory holds an embedding model, whichever factory is asked:
        one path, one set of defaults."""
        return AwqEmbeddingModel if source.is_embedder else cls._wrapper

    def __init__(self) -> None:
        raise OSError("use AutoAWQForCausalLM.from_pretrained or AutoAWQForCausalLM.from_quantized")

    @classmethod
    def from_pretrained(
        cls,
        model_path: str,
        torch_dtype: Any = "auto",
        trust_remote_code: bool = False,
        safetensors: bool = True,
        device_map: Any = None,
        download_kwargs: dict | None = None,
        low_cpu_mem_usage: bool = True,
        use_cache: bool = False,
        **model_init_kwargs: Any,
    ) -> Any:
        """A full-precision model to quantize, from a local directory or hub id. `dtype` is
        understood like `torch_dtype`.

        safetensors, low_cpu_mem_usage and use_cache are accepted for compatibility: weights are
        read from safetensors only, loading is always lean, and the cache is off while calibrating
        without changing the saved config. A model that is stored in another format (GPT-OSS in
        MXFP4, DeepSeek-V3 in FP8) is dequantized when `quantization_config` asks for it, e.g.
        `transformers.Mxfp4Config(dequantize=True)`.
        Raises ModelError or CheckpointError when there is no such model or its files are broken.
        """
        dtype = _dtype(model_init_kwargs.pop("dtype", torch_dtype))
        if not safetensors:
            logger.info("safetensors=False is ignored: weights are read from safetensors only.")
        kwargs = {**_download(download_kwargs), **model_init_kwargs}
        if device_map is not None:
            kwargs["device_map"] = device_map

        source = Source.open(model_path, trust_remote_code, **hub_arguments(kwargs))
        if source.is_quantized:
            _check_dequantizes(source, kwargs.get("quantization_config"))
        model = load_model(source, dtype, kind=cls._class_of(source), **kwargs)

        return cls._wrapper_of(source)(model, str(model_path), trust_remote_code=trust_remote_code)

    @classmethod
    def streamed(cls, source: Source, work: WorkFolder, torch_dtype: Any = "auto") -> Any:
        """A full-precision model whose blocks stay in their files, for `quantize_directory`.

        work: where quantized blocks are written.
        """
        blocks = StreamedBlocks(source, work, _dtype(torch_dtype), cls._class_of(source))
        model = cls._wrapper_of(source)(
            blocks.model, source.name, trust_remote_code=source.trust_remote_code
        )
        model._blocks = blocks

        return model

    @classmethod
    def from_quantized(
        cls,
        quant_path: str,
        quant_filename: str = "",
        max_seq_len: int = 2048,
        trust_remote_code: bool = False,
        fuse_layers: bool = True,
        use_exllama: bool = False,
        use_exllama_v2: bool = False,
        use_ipex: bool = False,
        batch_size: int = 1,
        safetensors: bool = True,
        device_map: Any = None,
        max_memory: dict | None = None,
        offload_folder: str | None = None,
        download_kwargs: dict | None = None,
        device: Any = None,
        quantize_lm_head: bool = False,
        capture_unfused: bool = True,
        **config_kwargs: Any,
    ) -> Any:
        """A quantized model ready to use; `.tokenizer` is the one saved beside it, or None.

        device: one device for the whole model; device_map: transformers' spreading over several.
        The GPU is taken when neither is given and there is one.
        fuse_layers: generation runs on fused blocks with a cache of `max_seq_len` tokens for each
        of `batch_size` rows (more rows make it grow), proven at the first `generate`; False: plain
        transformers.
        quantize_lm_head: generate through a 4-bit copy of the head. capture_unfused: as for
        `fuse_layers`. The use_… switches are accepted for compatibility.

        >>> from awq import AutoAWQForCausalLM
        >>> model = AutoAWQForCausalLM.from_quantized("my-model-awq", device="cpu")
        >>> ids = model.tokenizer("the old house", return_tensors="pt").input_ids
        >>> model.generate(ids, max_new_tokens=4, min_new_tokens=4).shape[1] - ids.shape[1]
        4
        """
        dtype = _dtype(config_kwargs.pop("dtype", config_kwargs.pop("torch_dtype", "auto")))
        if device is not None:
            usable_device(device)  # before anything is read or fetched
        # AutoAWQ's older name
        max_seq_len = config_kwargs.pop("max_new_tokens", None) or max_seq_len
        source = Source.open(
            quant_path,
            trust_remote_code,
            **hub_arguments({**_download(download_kwargs), **config_kwargs}),
        )
        stored = source.settings
        _note_unused(
            quant_filename=quant_filename,
            use_exllama=use_exllama,
            use_exllama_v2=use_exllama_v2,
            use_ipex=use_ipex,
            use_qbits=config_kwargs.pop("use_qbits", False),
        )
        placement = {"max_memory": max_memory, "offload_folder": offload_folder}
        kwargs = (
            {k: v for k, v in placement.items() if v is not None}
            | _download(download_kwargs)
            | config_kwargs
        )

        if device_map is not None and device is None:
            kwargs["device_map"] = device_map
        elif "device_map" not in kwargs:
            target = usable_device(device)
            # straight there: weights are moved to their kernels' layout where they land
            if target.type != "cpu":
                kwargs["device_map"] = {"": target}

        model = load_model(source, dtype, kind=cls._class_of(source), **kwargs)
        tokenizer = find_tokenizer(source.location, trust_remote_code)
        loaded = cls._wrapper_of(source)(
            model, str(quant_path), stored, tokenizer, trust_remote_code
        )
        if fuse_layers and isinstance(loaded, BaseAWQForCausalLM) and loaded.can_generate():
            loaded.fuse_layers(max_seq_len, batch_size, quantize_lm_head, capture_unfused)

        return loaded

    @classmethod
    def _class_of(cls, source: Source) -> Any:
        """The transformers class to load, or None for what the checkpoint names."""
        return None


def _check_dequantizes(source: Source, wanted: Any) -> None:
    """Refuses a checkpoint of packed weights, unless `wanted`, a config of transformers, asks for
    dense ones."""
    if bool(getattr(wanted, "dequantize", False)):
        return

    method = quant_method(source.config.quantization_config)
    if method == METHOD:
        raise ConfigError(
            f"{source.name} is quantized already; load it with from_quantized, or "
            "give the full-precision model to quantize."
        )

    advice = "start from the full-precision model"
    if method in _DEQUANTIZING:
        advice += (
            f", or pass quantization_config=transformers.{_DEQUANTIZING[method]}(dequantize=True)"
        )

    raise ConfigError(
        f"{source.name} is stored in {method} already, whose error would add to that of 4 bits; "
        f"{advice}."
    )


def _download(given: dict | None) -> dict:
    """`download_kwargs` without what belongs to `snapshot_download` alone: files are chosen by
    transformers here."""
    known = {*HUB_ARGUMENTS, "force_download"}
    theirs = {*inspect.signature(snapshot_download).parameters} - known
    return {name: value for name, value in (given or {}).items() if name not in theirs}


def _root_of(folder: str) -> str:
    """The sentence-transformers directory that a transformer's folder belongs to (`0_Transformer`),
    or that folder itself."""
    path = Path(folder)
    inside = (
        bool(folder)
        and not (path / "modules.json").exists()
        and (path.parent / "modules.json").exists()
    )
    return str(path.parent) if inside and path.is_dir() else folder


def _note_unused(**given: Any) -> None:
    named = [name for name, value in given.items() if value]
    if named:
        logger.info(
            "%s: accepted, without effect here: transformers' own layers are used, and the "
            "backend is chosen by device.",
            ", ".join(named),
        )


class AutoAWQForEmbedding(AutoAWQForCausalLM):
    """The same for embedding models: always the body (`AutoModel`), whose call gives
    `last_hidden_state`.

    What it returns is an `AwqEmbeddingModel`, whose `quantize` takes texts and whose `encode` gives
    embeddings.
    """

    _wrapper = AwqEmbeddingModel

    @classmethod
    def _class_of(cls, source: Source) -> Any:
        return body_class(source)

    @classmethod
    def from_sentence_transformer(cls, model: Any) -> AwqEmbeddingModel:
        """Around a live `SentenceTransformer` that came from a directory or the hub; `quantize`
        then changes it in place.

        `save_quantized` writes the files of that source beside the weights. Raises ModelError when
        there is no source.
        """
        body = getattr(model[0], "auto_model", None)
        source = _root_of(getattr(getattr(body, "config", None), "_name_or_path", ""))
        if body is None or not source:
            raise ModelError(
                "this SentenceTransformer does not begin with a transformer that was loaded; save "
                "and load it."
            )
        return AwqEmbeddingModel(body, str(source), tokenizer=model.tokenizer)
