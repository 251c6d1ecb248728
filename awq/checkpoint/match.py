"""Which linear of a model belongs to which packed weight of a checkpoint.

A checkpoint saved from `AutoModel` and one saved from a model with a head differ in a prefix, and
new releases of transformers move modules about. Names are therefore matched exactly first, then
without the base prefix, then by their unique ending.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_utils

from awq.checkpoint.files import DTYPE_NAMES, FLOATS, PackedTensors, check_complete
from awq.config import FORMATS, AwqConfig
from awq.errors import CheckpointError
from awq.formats import get_format
from awq.nn.surgery import linear_shape, named_linears

logger = logging.getLogger("awq.checkpoint")

_SHORTEST_ENDING = 3  # parts of a name, so that a layer's index is among them


def match_names(model: Any, packed: PackedTensors) -> dict[str, str]:
    """Module name → name in the checkpoint, for every linear whose packed weight is in the files.

    Raises CheckpointError when the files hold packed weights and none of them belongs to this
    model.
    """
    linears = named_linears(model)
    base = getattr(model, "base_model_prefix", "")
    today = current_names(model, packed)

    matched = {}
    for name in linears:
        for spelling in (name, f"{base}.{name}", name.removeprefix(f"{base}.")):
            if spelling in today:
                matched[name] = today[spelling]
                break

    left = set(packed) - set(matched.values())
    if left:
        matched |= _by_ending([n for n in linears if n not in matched], sorted(left))
        left -= set(matched.values())

    if not matched:
        raise CheckpointError(
            f"none of the checkpoint's {len(packed)} quantized weights (first: "
            f"{min(packed, default='none')}) "
            f"belongs to {type(model).__name__}."
        )

    if left:
        _check_left_over(model, sorted(left), matched)
    return matched


def _check_left_over(model: Any, left: list[str], matched: dict[str, str]) -> None:
    """Packed weights without a place in the model: those of a head may stay out where a body is
    loaded, no others."""
    used = {_list_of(name) for name in matched.values()} - {""}
    inside = [name for name in left if _list_of(name) in used]
    names = ", ".join((inside or left)[:3])
    if inside:
        raise CheckpointError(
            f"{len(inside)} quantized weights of the checkpoint have no place in "
            f"{type(model).__name__}: {names} …; "
            "it would compute with random numbers instead. Load it with the class and sizes that "
            "it was saved with."
        )
    logger.warning(
        "%d quantized weights of the checkpoint have no place in %s and are not used: %s …",
        len(left),
        type(model).__name__,
        names,
    )


def _list_of(name: str) -> str:
    """The list of blocks that a weight belongs to ("model.layers"), or "" outside lists."""
    parts = name.split(".")
    start = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[:start])


def current_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Module name in the installed transformers → name in the checkpoint; transformers 5 renames
    modules while loading."""
    keys = current_keys(model, [f"{name}.qweight" for name in stored])
    return {
        key.removesuffix(".qweight"): name.removesuffix(".qweight") for key, name in keys.items()
    }


def current_keys(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Tensor name in the installed transformers → name in the checkpoint, as transformers renames
    while loading.

    Tensors that transformers would join into one (a model's experts) keep the name of the joined
    tensor; the last one wins.
    """
    return dict(key_pairs(model, stored))


def key_pairs(model: Any, stored: Iterable[str]) -> list[tuple[str, str]]:
    """(name in the installed transformers, name in the checkpoint) of every tensor; several may be
    joined into one."""
    steps = conversions_of(model)
    renamings = [step for step in steps if not hasattr(step, "operations")]
    joinings = [step for step in steps if hasattr(step, "operations")]
    stored = list(stored)
    packed = {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}

    names = []
    for name in stored:
        key = name
        for step in renamings:
            key, _ = step.rename_source_key(key)
        if name.rpartition(".")[0] not in packed:  # tensors of packed linears stay as they are
            for step in joinings:
                key, _ = step.rename_source_key(key)

        names.append((key, name))

    return names


def merged_on_disk(model: Any, packed: Iterable[str]) -> list[str]:
    """Packed linears that transformers 5 would glue together, as dense weights, in its "original
    format" on disk."""
    joinings = [
        step.reverse_transform() for step in conversions_of(model) if hasattr(step, "operations")
    ]
    keys = {name: (f"{name}.weight", f"{name}.qweight") for name in packed}
    return [
        name
        for name in keys
        if any(step.rename_source_key(key)[1] for step in joinings for key in keys[name])
    ]


def all_current_keys(model: Any, stored: Iterable[str]) -> set[str]:
    """Like `current_keys`, with every tensor into which transformers cuts one of the files."""
    steps = conversions_of(model)
    renamings = [step for step in steps if not hasattr(step, "operations")]
    joinings = [step for step in steps if hasattr(step, "operations")]

    stored = list(stored)
    found = set(current_keys(model, stored))
    for name in stored:
        for step in renamings:
            name, _ = step.rename_source_key(name)
        for step in joinings:
            first, *others = step.target_patterns
            key, source = step.rename_source_key(name)
            if source is not None:
                found |= {key.replace(first, other) for other in others}

    return found


def unreturning(model: Any, packed: Iterable[str]) -> set[str]:
    """Packed linears whose tensors, saved as transformers would save them, mean something else when
    they are read again: the source has a tensor, and no module, in their place, or joins them.
    """
    keys = {f"{name}.qweight": name for name in packed}
    saved = _saved_keys(model, keys)
    today = current_keys(model, saved.values())
    back = {stored: key for key, stored in today.items()}
    return {name for key, name in keys.items() if back.get(saved[key]) != key}


def nameless(model: Any, linears: Iterable[str]) -> set[str]:
    """Linears that no file can hold packed: neither under the name of the source nor under that of
    the model would their tensors be found again."""
    lost = unreturning(model, linears)
    lost -= set(merged_on_disk(model, lost))  # `glued` moves their rows
    today = current_keys(model, [f"{name}.qweight" for name in lost])
    return {name for name in lost if today.get(f"{name}.qweight") != f"{name}.qweight"}


def _saved_keys(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Tensor name in the model → name on disk; no tensor is converted."""
    try:
        steps = [step.reverse_transform() for step in reversed(conversions_for_saving(model))]
    except ImportError:  # transformers 4 saves under the model's own names
        return {key: key for key in keys}

    joinings = [step for step in steps if hasattr(step, "operations")]
    renamings = [step for step in steps if not hasattr(step, "operations")]

    found = {}
    for key in keys:
        name = next((new for s in joinings for new, by in [s.rename_source_key(key)] if by), key)
        for step in renamings:
            name, _ = step.rename_source_key(name)
        found[key] = name

    return found


def conversions_of(model: Any) -> list[Any]:
    """How transformers turns tensors of a hub checkpoint of this type into the model's: renamings
    and converters, in order."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return _renamings_of_transformers_4(model)
    return get_model_conversion_mapping(model)


def conversions_for_saving(model: Any) -> list[Any]:
    """The conversions of a model's type that are undone when it is saved.

    transformers forgets those that met no tensor while it loaded, and packed tensors meet few. Of
    prefixes, only what was found in the files goes back.
    """
    from transformers import core_model_loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    prefixes: Any = getattr(core_model_loading, "PrefixChange", ())  # younger than 5.0
    known = inspect.signature(get_model_conversion_mapping).parameters
    current: dict[str, Any] = {"add_legacy": False} if "add_legacy" in known else {}
    used = {repr(step) for step in getattr(model, "_weight_conversions", None) or ()}
    steps = get_model_conversion_mapping(model, **current)

    return [step for step in steps if not isinstance(step, prefixes) or repr(step) in used]


def as_saved(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model under the names, and in the cut, of the source's files."""
    from transformers.core_model_loading import revert_weight_conversion

    had = model.__dict__.get("_weight_conversions")
    model._weight_conversions = conversions_for_saving(model) or None
    try:
        return revert_weight_conversion(model, tensors)
    finally:
        model.__dict__.pop("_weight_conversions", None)
        if had is not None:
            model._weight_conversions = had


def _renamings_of_transformers_4(model: Any) -> list[Any]:
    """4.52 to 4.57 rename tensors of the vision-language models that say so, and of no others."""
    names = [kind.__name__.lower() for kind in type(model).__mro__]
    if not any(part in name for part in getattr(modeling_utils, "VLMS", ()) for name in names):
        return []
    renamings = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    return [_Renamings(renamings)] if renamings else []


class _Renamings:
    """Pattern → replacement, the first that fits, with the interface of transformers 5."""

    def __init__(self, patterns: dict[str, str]) -> None:
        self.patterns = patterns

    def rename_source_key(self, key: str) -> tuple[str, None]:
        for pattern, replacement in self.patterns.items():
            renamed, count = re.subn(pattern, replacement, key)
            if count:
                return renamed, None
        return key, None


def _by_ending(names: list[str], packed: list[str]) -> dict[str, str]:
    """Pairs whose longest common ending belongs to one module only."""
    owners: dict[str, list[str]] = defaultdict(list)
    for name in names:
        for ending in _endings(name):
            owners[ending].append(name)

    found: dict[str, str] = {}
    for stored in packed:
        known = (ending for ending in _endings(stored) if ending in owners)
        longest = next(known, None)
        if longest is None or len(owners[longest]) != 1:
            continue
        found.setdefault(owners[longest][0], stored)

    return found


def _endings(name: str) -> list[str]:
    """The endings of a dotted name that say enough, the longest first."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - _SHORTEST_ENDING + 1)]


def check_shapes(name: str, module: nn.Module, tensors: dict[str, dict], config: AwqConfig) -> None:
    """Compares the headers of one packed linear with what the config promises.

    tensors: "qweight" | "qzeros" | "scales" → safetensors header entry. Raises CheckpointError
    naming what is missing, or the version and group size that the tensors have really.
    """
    check_complete(name, tensors)
    in_features, out_features = linear_shape(module)
    found = {kind: (tuple(entry["shape"]), entry["dtype"]) for kind, entry in tensors.items()}
    size = config.group_size_of(in_features, name)
    if _fits(found, in_features, out_features, size, config.format):
        return

    sizes = [size for size in (16, 32, 64, 128, 256, in_features) if in_features % size == 0]
    really = [
        (f, size)
        for f in FORMATS
        for size in sizes
        if _fits(found, in_features, out_features, size, f)
    ]
    hint = (
        " or ".join(f"version {f} with group_size {size}" for f, size in really)
        or "no version this package knows"
    )
    tensors_found = ", ".join(
        f"{kind} {list(shape)} {DTYPE_NAMES.get(dtype, dtype)}"
        for kind, (shape, dtype) in found.items()
    )
    raise CheckpointError(
        f"{name} [{out_features}, {in_features}]: config.json says version {config.format}, "
        f"group_size {config.group_size}, but its tensors {tensors_found} are {hint}; "
        "correct quantization_config in config.json."
    )


def fits_dtype(stored: str, dtype: torch.dtype) -> bool:
    """Whether a tensor of a dtype in a file's words ("F16") can be what a packed linear keeps as
    `dtype`."""
    if dtype.is_floating_point:
        return stored in FLOATS
    return DTYPE_NAMES.get(stored) == str(dtype).removeprefix("torch.")


def _fits(
    found: dict[str, tuple[tuple[int, ...], str]],
    in_features: int,
    out_features: int,
    size: int,
    format: str,
) -> bool:
    codec = get_format(format)
    if codec.why_not(in_features, out_features, size):
        return False
    return all(
        shape == found[kind][0] and fits_dtype(found[kind][1], dtype)
        for kind, (shape, dtype) in codec.shapes(in_features, out_features, size).items()
    )
