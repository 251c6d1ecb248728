"""Every tensor of a checkpoint accounted for: none missing, none left over, none that is not a
number.

transformers only warns about tensors that it did not find or had no place for, since people start
fine-tuning from parts of models; what is missing gets random numbers. A *quantized* checkpoint, or
one that is to be quantized, has no such excuse. This package's own doors ask transformers for its
loading report and refuse what that report lists (`check_report`). Behind transformers' own doors a
new head is legitimate, so only the blocks that hold packed weights must be complete there
(`check_blocks`).

A scale of an activation (`mlp.act.scales`, AutoAWQ's for GELU models) is a tensor like the others.
It belongs to a module without parameters, so `place_activation_scales` gives that module one before
the weights are loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awq.checkpoint.files import FLOATS
from awq.checkpoint.match import all_current_keys, current_keys, key_pairs
from awq.errors import CheckpointError
from awq.formats.gemv_fast import zeros_are_whole
from awq.nn.activation import ScaledActivation
from awq.nn.surgery import is_linear, linear_shape, replace_module

_WHOLE = ("BOOL", "U8", "I8", "I16", "I32", "I64")
MAX_NAMES_SHOWN = 3
_UNUSED_POOLER = re.compile(r"(^|\.)pooler\.")
_UP_TO_BLOCK_INDEX = re.compile(r"^(.*?\.\d+)\.")


def check_report(
    model: nn.Module,
    report: dict[str, Any],
    path: str | Path,
    body_only: bool = False,
) -> None:
    """Refuses a model that transformers could not fill with exactly what the files of `path` hold.

    report: transformers' loading report ("missing_keys", "unexpected_keys", "mismatched_keys").
    body_only: a body was asked for on purpose, so tensors of a head outside it may be left over.
    Raises CheckpointError with the first names.
    """
    kind = type(model).__name__
    headless = getattr(model, "base_model", model) is model
    missing = [
        name
        for name in report.get("missing_keys", ())
        if not (headless and _UNUSED_POOLER.search(name))
    ]
    if missing:
        raise CheckpointError(
            f"{path} lacks tensors that {kind} needs: {_first(missing)}; transformers would fill "
            "them with random numbers. "
            "Download or save the checkpoint again, or correct its config.json."
        )

    computed = _computed_tables(model)
    surplus = [
        name
        for name in report.get("unexpected_keys", ())
        if not (body_only and _outside(model, name)) and name.rpartition(".")[2] not in computed
    ]
    if surplus:
        raise CheckpointError(
            f"{path} holds tensors that have no place in {kind}: {_first(surplus)}; they would be "
            "ignored. "
            "Correct architectures or the sizes in its config.json."
        )

    mismatched = [str(entry[0]) for entry in report.get("mismatched_keys", ())]
    if mismatched:
        raise CheckpointError(
            f"{path} holds tensors of other shapes than {kind} has: {_first(mismatched)}."
        )


def _computed_tables(model: nn.Module) -> set[str]:
    """What the model calls the tables that it computes itself and never saves. Files of older
    releases hold some: `position_ids`, `inv_freq`."""
    return {name for module in model.modules() for name in module._non_persistent_buffers_set}


def settle_dtypes(model: Any, expected: Mapping[str, torch.dtype]) -> None:
    """Casts parameters that came in the files' dtype instead of the one that was asked for.

    transformers 5.0 casts no tensor of a quantized checkpoint that has another name there (BERT's
    norms). expected: parameter name → dtype, as the model's class makes it.
    """
    lists = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    kept = [part for name in lists for part in getattr(model, name, None) or ()]
    for name, parameter in model.named_parameters():
        dtype = expected.get(name, parameter.dtype)
        if parameter.dtype == dtype or not parameter.is_floating_point():
            continue
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameter name → shape, as the model's class makes it."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_parameter_shapes(model: Any, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses parameters that took another shape from a file.

    transformers 5.0 to 5.17 put whatever a quantized checkpoint holds into the model. Raises
    CheckpointError.
    """
    for name, shape in parameter_shapes(model).items():
        if shape != expected.get(name, shape):
            path = model.config._name_or_path
            raise CheckpointError(
                f"{path} holds {name} of shape {shape}, and {type(model).__name__} has "
                f"{expected[name]}."
            )


def _outside(model: nn.Module, name: str) -> bool:
    """Whether a tensor belongs to no child of the model: a head's, where the body was loaded."""
    base = getattr(model, "base_model_prefix", "")
    top = name.removeprefix(f"{base}.").split(".")[0]
    return top not in dict(model.named_children())


def check_blocks(
    model: nn.Module,
    stored: Iterable[str],
    matched: Iterable[str],
    apart: Iterable[str] = (),
) -> None:
    """Refuses blocks with packed linears that lack other tensors: they would be random numbers.

    stored: names of all tensors in the files. matched: names of the model's packed linears. apart:
    of modules that are accounted for elsewhere. Heads and all else outside these blocks may be
    missing, for `AutoModelFor…` puts new heads on old bodies. Raises CheckpointError.
    """
    blocks = {_block_of(name) for name in matched} - {""}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    endings = {_in_block(name) for name in all_current_keys(model, stored)}
    elsewhere = tuple(f"{name}." for name in apart)
    missing = [
        name
        for name in model.state_dict()
        if _block_of(name) in blocks
        and name not in tied
        and _in_block(name) not in endings
        and not name.startswith(elsewhere)
    ]
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks tensors of blocks that {type(model).__name__} reads packed: "
            f"{_first(missing)}; "
            "download or save it again."
        )


def _block_of(name: str) -> str:
    """Name up to the first index ("model.layers.3"), or "" outside lists."""
    match = _UP_TO_BLOCK_INDEX.match(f"{name}.")
    return match.group(1) if match else ""


def _in_block(name: str) -> str:
    """Name from the first index on ("3.mlp.up_proj.bias"): what prefixes of bodies and heads do not
    change."""
    parts = name.split(".")
    start = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[start:])


def place_activation_scales(model: nn.Module, headers: dict[str, dict[str, Any]]) -> list[str]:
    """Wraps every activation that the files hold scales for in a `ScaledActivation`, in place;
    returns their names.

    headers: of all tensors in the files. A tensor `X.scales` without `X.qweight` means that the
    output of module X, which has no parameters of its own, is divided by it. Must run before
    weights are loaded.
    """
    stored = [
        name
        for name in headers
        if name.endswith(".scales") and f"{name.removesuffix('.scales')}.qweight" not in headers
    ]
    modules = dict(model.named_modules())
    base = getattr(model, "base_model_prefix", "")

    placed = []
    for name, key in current_keys(model, stored).items():
        spelled = (name, f"{base}.{name}", name.removeprefix(f"{base}."))
        place = next(
            (s.removesuffix(".scales") for s in spelled if s.removesuffix(".scales") in modules),
            None,
        )
        if place is None or any(True for _ in modules[place].parameters()):
            continue

        shape = headers[key]["shape"]
        _check_scaled_width(modules, place, shape, key)
        scales = torch.empty(shape, device="meta")
        replace_module(model, place, ScaledActivation(modules[place], scales))
        placed.append(place)

    _check_every_block(modules, placed)
    return placed


def _check_every_block(modules: dict[str, nn.Module], placed: list[str]) -> None:
    """Blocks are alike: where one has scales for its activation, a block without any has lost
    them."""
    alike = {_without_index(name) for name in placed}
    for name in modules:
        if name not in placed and _without_index(name) in alike:
            raise CheckpointError(
                f"the checkpoint lacks {name}.scales, which its other blocks have; download it "
                "again."
            )


def _without_index(name: str) -> str:
    """The name with its block's index left out, the same for all blocks of a list."""
    block = _block_of(name)
    return name.replace(block, block.rstrip("0123456789"), 1)


def _check_scaled_width(
    modules: dict[str, nn.Module],
    place: str,
    shape: list[int],
    key: str,
) -> None:
    """The output of an activation goes into a linear beside it, so its scales are as many as that
    has inputs."""
    siblings = modules[place.rpartition(".")[0]].children()
    widths = sorted({linear_shape(child)[0] for child in siblings if is_linear(child)})
    if len(shape) != 1 or (widths and shape[0] not in widths):
        raise CheckpointError(
            f"{key} has shape {shape}, and the linears beside it take {widths} inputs; the file "
            "is broken."
        )


def check_finite(
    model: nn.Module,
    path: str | Path,
    error: Callable[[str], Exception] = CheckpointError,
) -> None:
    """Refuses parameters that hold NaN or infinity, with their names; those of packed linears are
    `check_packed_numbers`'s."""
    named = ((name, p) for name, p in model.named_parameters() if p.is_floating_point())
    broken = [name for name, parameter in named if not is_finite(parameter)]
    if broken:
        raise error(
            f"{path} holds numbers that are not finite in {_first(broken)}; download or make it "
            "again."
        )


def check_packed_numbers(model: nn.Module, matched: Sequence[str]) -> None:
    """Refuses packed linears and scaled activations whose scales or biases hold NaN or infinity,
    as all their outputs would, and zero points that no writer makes."""
    broken = []
    for name in matched:
        module = model.get_submodule(name)
        for kind, tensor in chain(
            module.named_buffers(recurse=False), module.named_parameters(recurse=False)
        ):
            if tensor.is_floating_point() and not is_finite(tensor):
                broken.append(f"{name}.{kind}")

    if broken:
        raise CheckpointError(
            f"the checkpoint holds numbers that are not finite in {_first(broken)}; download it "
            "again."
        )

    uneven = [name for name in matched if _has_uneven_zeros(model.get_submodule(name))]
    if uneven:
        raise CheckpointError(
            f"qzeros are no whole multiples of scales in {_first(uneven)}; download the checkpoint "
            "again."
        )


def _has_uneven_zeros(module: Any) -> bool:
    if getattr(module, "format", None) != "gemv_fast" or module.scales.is_meta:
        return False
    return not zeros_are_whole(module.scales, module.qzeros)


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor holds finite numbers only: one pass, and no copy."""
    if tensor.is_meta or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_stored_floats(
    model: nn.Module,
    headers: Mapping[str, Mapping[str, Any]],
    path: str | Path,
) -> None:
    """Refuses whole numbers and 8-bit floats in the files where the model has floating-point
    parameters.

    transformers casts them in silence. An 8-bit float is half of a pair: its scale belongs to a
    quantization_config.
    """
    parameters = {
        name for name, parameter in model.named_parameters() if parameter.is_floating_point()
    }
    base = getattr(model, "base_model_prefix", "")
    for key, name in key_pairs(model, headers):
        spelled = {key, f"{base}.{key}", key.removeprefix(f"{base}."), name}
        if headers[name]["dtype"] not in (*FLOATS, "F64") and spelled & parameters:
            raise CheckpointError(
                f"{path} holds {name} as {headers[name]['dtype']}; it must be a 16- or 32-bit "
                "floating-point tensor."
            )


def hint_of_dtypes(headers: Mapping[str, Mapping[str, Any]]) -> str:
    """What to add to another reader's error, which names no tensor: weights of whole numbers."""
    strange = [n for n, e in headers.items() if n.endswith(".weight") and e["dtype"] in _WHOLE]
    return f" ({_first(strange)} hold whole numbers)" if strange else ""


def check_stored_biases(packed: Iterable[str], headers: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses biases of packed linears that the files hold as anything but floating-point
    numbers."""
    for name in packed:
        header = headers.get(f"{name}.bias", {})
        dtype = header.get("dtype", "F32")
        if dtype not in (*FLOATS, "F64"):
            raise CheckpointError(
                f"the checkpoint holds {name}.bias as {dtype}; it must be a 16- or 32-bit "
                "floating-point tensor."
            )


def check_float_parameters(model: nn.Module, path: str | Path) -> None:
    """Refuses whole numbers where the model computes with floating ones."""
    strange = [
        name for name, parameter in model.named_parameters() if not parameter.is_floating_point()
    ]
    if strange:
        dtype = str(dict(model.named_parameters())[strange[0]].dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{path} holds {dtype} where floating-point numbers belong: {_first(strange)}."
        )


def _first(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - MAX_NAMES_SHOWN} more" if len(listed) > MAX_NAMES_SHOWN else ""
    return ", ".join(listed[:MAX_NAMES_SHOWN]) + more
