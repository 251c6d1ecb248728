"""Loading a checkpoint through transformers, after checking its files, and accounting for every
tensor afterwards."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    PreTrainedModel,
)

from awq.checkpoint.account import (
    check_finite,
    check_float_parameters,
    check_report,
    check_stored_floats,
    hint_of_dtypes,
)
from awq.checkpoint.files import first_architecture
from awq.checkpoint.hf import register
from awq.checkpoint.match import conversions_for_saving
from awq.checkpoint.sizes import beyond_the_files
from awq.checkpoint.source import Source, hub_arguments
from awq.errors import CheckpointError, ModelError, first_line
from awq.nn.model_code import PASSED_ON
from awq.nn.modes import ordinary_tensors

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_IS_5 = int(transformers.__version__.split(".")[0]) >= 5
# torch's default dtype belongs to the process, and transformers changes it while it builds a model.
_one_at_a_time = threading.RLock()


def model_class(source: Source) -> Any:
    """The transformers class for a model: the one that its config names, or AutoModel for
    directories of embedding models.

    Raises ModelError when the config names a class of another kind of model.
    """
    config = source.config
    architecture = first_architecture(getattr(config, "architectures", None))
    if source.is_embedder and not architecture.endswith("EncoderModel"):
        return AutoModel

    remote = source.trust_remote_code and bool(getattr(config, "auto_map", None))
    kind = getattr(transformers, architecture, None) if architecture and not remote else None
    if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
        borrower = _auto_class_of(config, kind)
        if borrower is not None:
            return borrower
        _check_kind(source, kind)
        return kind
    if not architecture and type(config) in AutoModelForCausalLM._model_mapping:
        # BERT and its kin can be built as decoders too; what has a masked head is an encoder.
        if type(config) in AutoModelForMaskedLM._model_mapping:
            return AutoModel
        return AutoModelForCausalLM
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return AutoModelForCausalLM
    return AutoModel


def body_class(source: Source) -> Any:
    """The class whose call gives `last_hidden_state`: AutoModel, or the encoder that the config
    names (T5EncoderModel)."""
    named = model_class(source)
    return named if named.__name__.endswith("EncoderModel") else AutoModel


def _auto_class_of(config: Any, kind: Any) -> Any:
    """The Auto class through which a type of its own config is built as another type's class
    (InternLM 3 as Llama), or None."""
    expected = getattr(kind, "config_class", None)
    if isinstance(expected, type) and isinstance(config, expected):
        return None

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping and auto._model_mapping[type(config)] is kind:
            return auto

    return None


def _check_kind(source: Source, kind: Any) -> None:
    expected = getattr(kind, "config_class", None)
    if isinstance(expected, type) and not isinstance(source.config, expected):
        raise ModelError(
            f"{source.name}: config.json names the class {kind.__name__}, which is no model of "
            f"type {source.config.model_type}; correct architectures."
        )


def load_model(
    path: str | Path | Source,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    kind: Any = None,
    **kwargs: Any,
) -> Any:
    """A transformers model in evaluation mode, quantized or not, of which every tensor came from
    the files.

    path: local directory, hub id, or an open `Source`. dtype: of everything that is not packed;
    "auto" is what the checkpoint
    was saved in. kind: the transformers class, e.g. `transformers.AutoModel`; None takes what fits
    the checkpoint.
    kwargs: of `from_pretrained` (device_map, revision …).

    Raises ModelError when there is no such model or its config cannot be built, CheckpointError
    when files are broken, or tensors missing, left over or not finite.
    """
    register()
    if isinstance(path, Source):
        source = path
    else:
        source = Source.open(path, trust_remote_code, **hub_arguments(kwargs))

    chosen = kind or model_class(source)
    if (
        chosen is AutoModelForCausalLM
        and not source.trust_remote_code
        and type(source.config) not in chosen._model_mapping
    ):
        raise ModelError(
            f"model {source.name} of type {source.config.model_type} has no causal language model "
            "in transformers."
        )

    arguments = {
        **kwargs,
        "dtype" if _IS_5 else "torch_dtype": dtype,
        "trust_remote_code": source.trust_remote_code,
        "use_safetensors": True,
    }
    with _one_at_a_time:
        # Some releases fill a model before they compare its shapes; on the meta device nothing is
        # filled. Releases before 5 cannot load onto it.
        if _IS_5 and beyond_the_files(source.config.to_dict(), source.headers):
            _from_pretrained(chosen, source, {**arguments, "device_map": {"": "meta"}})
        model, report = _from_pretrained(chosen, source, arguments)
    if source.is_quantized and not source.packed:
        _forget_storage(model)

    check_report(model, report, source.name, body_only=chosen is AutoModel or kind is not None)
    check_float_parameters(model, source.name)
    if getattr(source.config, "quantization_config", None) is None or source.packed:
        check_stored_floats(model, source.headers, source.name)

    check_finite(model, source.name)
    _check_special_ids(model, source.name)

    return model.eval()


def _check_special_ids(model: Any, path: str | Path) -> None:
    """Refuses settings of `generate` that name tokens by anything but numbers; transformers would
    fail when it generates."""
    settings = getattr(model, "generation_config", None)
    for name in _SPECIAL_IDS:
        value = getattr(settings, name, None)
        listed = value if isinstance(value, (list, tuple)) else [value]
        if value is None or (listed and all(type(i) is int for i in listed)):
            continue
        raise CheckpointError(
            f"{path} gives {name} as {value!r:.100} in its generation_config.json or config.json; "
            "it must be a token's number, or a list of them."
        )


def _forget_storage(model: Any) -> None:
    """Of a model that was dequantized while it was loaded: else transformers would save it under
    the names of that format."""
    if getattr(model, "_weight_conversions", None) is not None:
        model._weight_conversions = conversions_for_saving(model)


def _from_pretrained(
    kind: Any,
    source: Source,
    arguments: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    before = torch.get_default_dtype()
    try:
        with ordinary_tensors():
            return kind.from_pretrained(source.location, output_loading_info=True, **arguments)
    except PASSED_ON:
        raise
    except Exception as error:  # whatever transformers meets in someone's files
        raise CheckpointError(
            f"{source.name} cannot be loaded as {kind.__name__}: {first_line(error)}"
            f"{hint_of_dtypes(source.headers)}"
        ) from error
    finally:
        torch.set_default_dtype(before)
