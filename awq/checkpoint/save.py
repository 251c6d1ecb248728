"""Writing a checkpoint: transformers' own save into a temporary sibling, renamed when everything is
there."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from awq.checkpoint.card import write_card
from awq.checkpoint.companions import copy_companions, source_directory
from awq.checkpoint.directory import complete_directory
from awq.checkpoint.expert_names import router_spellings
from awq.checkpoint.files import REPORT_FILE, read_json
from awq.checkpoint.glued import in_source_cut
from awq.checkpoint.match import merged_on_disk
from awq.checkpoint.modules import body_directory
from awq.checkpoint.shards import Parts, check_shard_size, join_shards
from awq.config import AwqConfig
from awq.nn.linear import WQLinear
from awq.nn.packed_experts import AwqExperts
from awq.nn.surgery import named_linears
from awq.nn.unfinished import check_finished

GENERATION_FILE = "generation_config.json"

logger = logging.getLogger("awq.checkpoint")


def save_checkpoint(
    model: Any,
    directory: str | Path,
    config: AwqConfig,
    report: Any = None,
    source: str | Path | None = None,
    tokenizer: Any = None,
    shard_size: str | int = "5GB",
    packed: bool = True,
    parts: Parts | None = None,
) -> None:
    """Saves a quantized transformers model with everything that belongs to it.

    report: a `QuantReport`, written as JSON and into the model card. source: directory or hub id of
    the original model; its files other than weights (tokenizer, chat template, modules.json,
    pooling …) are carried over. tokenizer: saved when the
    source brings none. shard_size: largest weight file. packed=False writes dense weights without a
    quantization config. parts: of a model that was written block by block; they become shards.

    `directory` appears, or changes, only when all of it is written; files of other names in it
    stay. Raises CheckpointError when writing fails; then nothing is left behind.
    """
    check_finished(model)
    check_shard_size(shard_size)
    origin = source_directory(source)

    if packed:
        settings = config.with_(modules_to_not_convert=unconverted(model)).to_transformers_dict()
    else:
        settings = None

    inner = body_directory(origin).relative_to(origin) if origin is not None else Path()

    with complete_directory(directory, origin) as work:
        body = work / inner
        body.mkdir(parents=True, exist_ok=True)
        with _config_of(model, settings), _generation_as_it_is(model, body):
            if parts is None:
                names = names_on_disk(model, _packed_names(model))
                chosen = _stored_once(model)
                if names:
                    chosen = {"state_dict": in_source_cut(model, chosen.get("state_dict"))}
                model.save_pretrained(body, max_shard_size=shard_size, **names, **chosen)
            else:
                rest = in_source_cut(model, parts.rest) if parts.names else parts.rest
                model.save_pretrained(
                    body, max_shard_size=shard_size, state_dict=rest, **parts.names
                )
                join_shards(body, parts.files, model.num_parameters())

        if origin is not None:
            copy_companions(origin, work)
        if tokenizer is not None and not (body / "tokenizer_config.json").exists():
            tokenizer.save_pretrained(body)
        if report is not None:
            report.save(work / REPORT_FILE)
        if report is not None or not (work / "README.md").exists() or not _is_quantized(origin):
            write_card(work, config, report, source, packed, Path(directory).name)


def unconverted(model: Any) -> tuple[str, ...]:
    """Full names of the linears that are still dense, with and without the base prefix.

    Names are written out in full because readers match them differently: transformers by their
    start or end, vLLM and SGLang by any part, where a short name like "mlp.gate" would hit
    "mlp.gate_up_proj".
    """
    names = set(named_linears(model)) | router_spellings(model)
    base = f"{getattr(model, 'base_model_prefix', '')}."
    return tuple(sorted(names | {name.removeprefix(base) for name in names if base != "."}))


def _packed_names(model: Any) -> list[str]:
    """Full names of the packed linears, those of experts included."""
    packed = [name for name, module in model.named_modules() if isinstance(module, WQLinear)]
    for name, module in model.named_modules():
        if isinstance(module, AwqExperts):
            packed += [f"{name}.{linear}" for linear in module.linear_names()]
    return packed


def names_on_disk(model: Any, packed: Iterable[str]) -> dict[str, bool]:
    """Argument of save_pretrained: it converts tensors by itself, unless packed ones are cut
    otherwise in the source. Then `in_source_cut` converts them.

    packed: full names of the packed linears.
    """
    return {"save_original_format": False} if merged_on_disk(model, packed) else {}


def _stored_once(model: Any) -> dict[str, dict[str, Tensor]]:
    """Argument of save_pretrained, where it is needed: tensors without those of packed linears
    under their second name, and copies of those whose tie the model does not declare."""
    tensors = model.state_dict()
    kept = without_second_names(model, tensors)
    copies = _undeclared_ties(model, kept)
    if len(kept) == len(tensors) and not copies:
        return {}
    return {"state_dict": kept | copies}


def _undeclared_ties(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that share their memory with another one of the model.

    save_pretrained stores the ties of `_tied_weights_keys` once and refuses all others. Before
    transformers 5 embeddings are also tied by a setting alone, in models whose code declares none.
    """
    declared = [
        pattern
        for module in model.modules()
        for pattern in getattr(module, "_tied_weights_keys", None) or ()
    ]
    copies = {}
    seen = set()
    for name, tensor in tensors.items():
        if tensor.device.type == "meta" or any(re.search(pattern, name) for pattern in declared):
            continue

        place = (tensor.device, tensor.data_ptr(), tensor.shape)
        if place in seen and tensor.numel():
            copies[name] = tensor.clone()
        seen.add(place)

    return copies


def without_second_names(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the tensors of packed linears that stand in it a second time.

    transformers stores tied weights once by a list of their names, which packed tensors are not on.
    """
    seen: set[nn.Module] = set()
    again = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (WQLinear, AwqExperts)):
            again += [f"{name}."] if module in seen else []
            seen.add(module)

    return {name: t for name, t in tensors.items() if not name.startswith(tuple(again))}


def tensors_on_disk(
    model: Any,
    tensors: dict[str, Tensor],
    names: dict[str, bool],
) -> dict[str, Tensor]:
    """A part of a model's tensors as save_pretrained would write them.

    names: of `names_on_disk`.
    """
    from transformers.core_model_loading import revert_weight_conversion

    ignored = model._keys_to_ignore_on_save or ()
    tensors = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    if names.get("save_original_format", True):
        tensors = revert_weight_conversion(model, tensors)
    else:
        tensors = in_source_cut(model, tensors)

    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _is_quantized(origin: Path | None) -> bool:
    path = None if origin is None else origin / "config.json"
    return path is not None and path.is_file() and bool(read_json(path).get("quantization_config"))


@contextmanager
def _generation_as_it_is(model: Any, body: Path) -> Iterator[None]:
    """Saves settings of `generate` that contradict each other as they are.

    transformers loads them, as many published models have them (a temperature beside greedy
    choice), and refuses to save them.
    """
    own = getattr(model, "generation_config", None)
    if own is None or _can_be_saved(own):
        yield
        return

    model.generation_config = type(own)()
    try:
        yield
    finally:
        model.generation_config = own
    own.to_json_file(body / GENERATION_FILE)


def _can_be_saved(settings: Any) -> bool:
    with TemporaryDirectory() as place:
        try:
            settings.save_pretrained(place)
        except ValueError:
            return False
    return True


@contextmanager
def _config_of(model: Any, settings: dict[str, Any] | None) -> Iterator[None]:
    """Shows `settings` as the model's quantization_config while it is saved, and puts back what was
    there."""
    config = model.config
    quantizer = model.__dict__.pop("hf_quantizer", None)
    had = config.__dict__.pop("quantization_config", None)
    if settings is not None:
        config.quantization_config = settings
    try:
        yield
    finally:
        config.__dict__.pop("quantization_config", None)
        if had is not None:
            config.quantization_config = had
        if quantizer is not None:
            model.hf_quantizer = quantizer
