"""What can be known to be wrong with a model or its settings before any work: asked once, by every
door that quantizes."""

from __future__ import annotations

from difflib import get_close_matches
from itertools import chain
from typing import Any

from torch import nn

from awq.checkpoint.account import check_finite
from awq.config import AwqConfig
from awq.errors import ConfigError, ModelError
from awq.nn.weight_access import changed_by_forward


def check_quantizable(
    model: nn.Module,
    config: AwqConfig,
    path: Any = "the model",
    streamed: bool = False,
) -> None:
    """Refuses weights that are elsewhere or no numbers, and exclusions that exclude nothing.

    Raises ModelError or ConfigError, with names; no weight was touched then.
    """
    check_exclusions(model, config.modules_to_not_convert)
    if streamed:
        return  # its blocks are looked at when they are read

    offloaded = [
        name
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
        if tensor.is_meta
    ]
    if offloaded:
        raise ModelError(
            f"{offloaded[0]} and {len(offloaded) - 1} more tensors of {path} are offloaded "
            "(device_map); load the model on the "
            "CPU to quantize it: blocks are moved to the GPU one at a time."
        )

    frozen = [name for name, parameter in model.named_parameters() if parameter.is_inference()]
    if frozen:
        raise ModelError(
            f"{frozen[0]} and {len(frozen) - 1} more parameters of {path} were made in inference "
            "mode, where nobody may change them; load the model outside of torch.inference_mode()."
        )

    changed = changed_by_forward(model)
    if changed:
        raise ModelError(
            f"{type(model).__name__} changes its own weights in its forward ({changed[0]} and "
            f"{len(changed) - 1} more), which packed weights cannot be."
        )
    check_finite(model, path, ModelError)


def check_exclusions(model: nn.Module, names: tuple[str, ...]) -> None:
    """Raises ConfigError for a name in `modules_to_not_convert` that is no module of the model,
    with names like it."""
    modules = [name for name, _ in model.named_modules() if name]
    for name in names:
        if any(f".{name}." in f".{module}." for module in modules):
            continue

        parts = sorted(
            {part for module in modules for part in module.split(".") if not part.isdigit()}
        )
        near = (
            get_close_matches(name.strip("*.").rpartition(".")[2], parts, n=3, cutoff=0.5)
            or parts[:5]
        )
        if any(sign in name for sign in "*:\\^$?["):
            pattern = " Patterns are not understood."
        else:
            pattern = ""

        raise ConfigError(
            f"modules_to_not_convert: {name!r} is no module of the model.{pattern} Give a "
            "module's full name or a part of it "
            f"between dots, such as {', '.join(near)}."
        )
