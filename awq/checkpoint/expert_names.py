"""What the linears of experts are called in checkpoints: transformers' own converters, read
backwards.

transformers knows, for every type of mixture, how the tensors of a hub checkpoint become its 3-D
parameters. A miniature of these parameters, in which every element says which expert and which of
gate, up and down it belongs to, is sent through the same converters as saving a model does. The
names under which the elements come out are the checkpoint's. No table of model types is needed, and
a type that transformers learns tomorrow works.

Where the original checkpoint stores its experts fused, there is no such name; then the linears are
called as in most
checkpoints: `experts.3.gate_proj`, `up_proj`, `down_proj`. All serving engines that read such types
accept these.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from awq.checkpoint.match import current_names
from awq.folds.fold import reader_names
from awq.nn.blocks import is_product
from awq.nn.expert_shape import ExpertNames, ExpertShape, fused_experts
from awq.nn.packed_experts import AwqExperts
from awq.nn.sorted_products import sorted_products

logger = logging.getLogger("awq.checkpoint")

_GATE, _UP, _DOWN = range(3)


def expert_names(model: Any) -> dict[str, ExpertNames]:
    """Name of a module of fused experts → names of its experts' linears, as checkpoints of this
    type have them.

    One module of every class and shape is asked; the others are alike.
    """
    known: dict[Any, ExpertNames] = {}
    names = {}
    for name, shape in fused_experts(model).items():
        kind = type(model.get_submodule(name)), shape
        if kind not in known:
            known[kind] = _names_of(model, name, shape) or ExpertNames()
        names[name] = known[kind]

    return names


def router_spellings(model: Any) -> set[str]:
    """Routers beside packed experts that are no linears, as transformers and as the checkpoint call
    them.

    Some engines build such a router as a quantized linear unless it is named as one that is not.
    """
    names = set()
    for name, module in model.named_modules():
        if not isinstance(module, AwqExperts):
            continue

        parent = name.rpartition(".")[0]
        for inner in reader_names(model.get_submodule(parent)):
            full = f"{parent}.{inner}"
            if not full.startswith(f"{name}.") and not is_product(model.get_submodule(full)):
                names.add(full)
    return names | set(_on_disk(model, names))


def _on_disk(model: Any, names: Iterable[str]) -> list[str]:
    """Names of modules with a weight, as they are saved."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return []

    weights = {f"{name}.weight": model.get_submodule(name).weight for name in names}
    return [
        key.removesuffix(".weight")
        for key in revert_weight_conversion(model, weights)
        if key.endswith(".weight")
    ]


def names_in_files(model: Any, stored: Iterable[str]) -> dict[str, ExpertNames]:
    """Like `expert_names`, for the modules whose experts' packed linears are among `stored` (module
    names in the files).

    Files that other tools wrote may have the usual names where the type's own are others.
    """
    today = set(current_names(model, stored))
    found = {}
    for name, names in expert_names(model).items():
        for candidate in (names, ExpertNames()):
            if f"{name}.0.{candidate.down}" in today:
                found[name] = candidate
                break

    return found


def sorted_in_files(model: Any, stored: Iterable[str]) -> list[str]:
    """Names of the modules that hold one product of all experts and whose packed linears are among
    `stored`."""
    today = set(current_names(model, stored))
    return [name for name in sorted_products(model) if f"{name}.0" in today]


def _names_of(model: Any, name: str, shape: ExpertShape) -> ExpertNames | None:
    """The names that the converters give, or None where they give none for each expert and part."""
    if shape.stacks:
        return None

    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 has no 3-D experts of this contract
        return None

    try:
        with torch.device("cpu"):  # models are built on the meta device, and labels need values
            saved = revert_weight_conversion(model, _miniature(name, shape))
    except Exception as error:  # converters may ask for more than a miniature has
        logger.debug("%s: its converters cannot be read backwards: %s", name, error)
        return None

    parts: dict[tuple[int, int], str] = {}
    for key, tensor in saved.items():
        labels = tensor.unique().tolist()
        if len(labels) != 1 or not key.endswith(".weight"):
            return None
        parts[divmod(int(labels[0]), 3)] = key.removesuffix(".weight")

    wanted = [_GATE, _UP, _DOWN] if shape.has_gate else [_UP, _DOWN]
    return _common_names(model, name, shape, parts, wanted)


def _miniature(name: str, shape: ExpertShape) -> dict[str, Tensor]:
    """Parameters of a few rows, filled with 3 · expert + part."""
    first_label = 3 * torch.arange(shape.num_experts).view(-1, 1, 1).float()
    labels = first_label.expand(-1, 2, 2)  # [experts, 2, 2]
    tensors = {"down_proj": labels + _DOWN}
    if shape.has_gate:
        tensors["gate_up_proj"] = shape.join(labels + _GATE, labels + _UP, 1)
    else:
        tensors["up_proj"] = labels + _UP

    if shape.transposed:
        tensors = {key: tensor.transpose(1, 2).contiguous() for key, tensor in tensors.items()}
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def _common_names(
    model: Any,
    name: str,
    shape: ExpertShape,
    parts: dict[tuple[int, int], str],
    wanted: list[int],
) -> ExpertNames | None:
    """Names below an expert's number, when they are the same for all experts."""
    today = {stored: current for current, stored in current_names(model, parts.values()).items()}
    common: dict[int, str] = {}
    for number in range(shape.num_experts):
        prefix = f"{name}.{number}."
        for part in wanted:
            stored = parts.get((number, part))
            if stored is None or not today[stored].startswith(prefix):
                return None

            ending = today[stored].removeprefix(prefix)
            if common.setdefault(part, ending) != ending:
                return None

    gate = common.get(_GATE, ExpertNames().gate)
    return ExpertNames(gate, common[_UP], common[_DOWN])
