"""Loading a checkpoint through transformers, after checking the files of a local directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from awq.checkpoint.files import check_directory, read_json
from awq.checkpoint.hf import register
from awq.errors import ModelError


def auto_class(path: str | Path, config: Any) -> Any:
    """The transformers class for a model: AutoModel for encoders and sentence embedders, else the one with its own head.

    path: local directory or hub id; config: its transformers config.
    """
    if is_embedder(path):
        return AutoModel
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if not architecture and type(config) in AutoModelForCausalLM._model_mapping:
        # BERT and its kin can be built as decoders too; what has a masked head is an encoder.
        return AutoModel if type(config) in AutoModelForMaskedLM._model_mapping else AutoModelForCausalLM
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return AutoModelForCausalLM
    for head in ("ForSequenceClassification", "ForTokenClassification", "ForConditionalGeneration"):
        if architecture.endswith(head) and hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    return AutoModel


def is_embedder(path: str | Path) -> bool:
    """Whether a local directory is sentence-transformers' of a model for embeddings, not of a cross-encoder with its head."""
    settings = Path(path) / "config_sentence_transformers.json"
    kind = read_json(settings).get("model_type") if settings.is_file() else None
    return (Path(path) / "modules.json").is_file() and kind != "CrossEncoder"


def read_config(path: str | Path, trust_remote_code: bool = False, **download: Any) -> Any:
    """transformers config of a local directory or hub id; checks a local directory's files first.

    Raises CheckpointError for broken files, ModelError when there is no such model.
    """
    if os.path.isdir(path):
        check_directory(Path(path) / download.get("subfolder", ""))
    elif os.path.exists(path) or str(path).startswith((".", "/", "~")):
        raise ModelError(f"model {path} does not exist as a directory.")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **download)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {path!s} cannot be loaded: {str(error).splitlines()[0]}") from error


def load_model(
    path: str | Path,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    kind: Any = None,
    **kwargs: Any,
) -> Any:
    """A transformers model in evaluation mode from a local directory or hub id, quantized or not.

    kind: the transformers class to use instead of the one that fits the model. Raises CheckpointError, ConfigError or
    ModelError before anything is built.
    """
    register()
    download = {k: kwargs[k] for k in ("revision", "cache_dir", "token", "subfolder", "local_files_only") if k in kwargs}
    config = read_config(path, trust_remote_code, **download)
    kind = kind or auto_class(path, config)
    if kind is AutoModelForCausalLM and not trust_remote_code and type(config) not in kind._model_mapping:
        raise ModelError(f"model {path!s} of type {config.model_type} has no causal language model in transformers.")
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    return kind.from_pretrained(path, trust_remote_code=trust_remote_code, use_safetensors=True, **{name: dtype}, **kwargs).eval()


def load_checkpoint(
    path: str | Path,
    auto_class: Any = None,
    device_map: Any = None,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> Any:
    """A quantized model. dtype: of everything that is not packed; "auto" is what the checkpoint was saved in.

    auto_class: e.g. `transformers.AutoModel`; None takes what fits the checkpoint.
    """
    if device_map is not None:
        kwargs["device_map"] = device_map
    return load_model(path, dtype, trust_remote_code, auto_class, **kwargs)
