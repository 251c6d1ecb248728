"""Packed linears after transformers has loaded a model: what it tied, cast or left out is put right
or refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open

from awq.checkpoint.files import PackedTensors
from awq.config import stored_dtypes
from awq.errors import CheckpointError
from awq.formats import get_format
from awq.nn.surgery import named_linears, output_head


def stored_elsewhere(model: Any, matched: Iterable[str]) -> dict[str, str]:
    """Linear that the files do not hold → the packed linear whose weight it shares: blocks that a
    model runs twice (zamba)."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    packed = set(matched)
    found = {}
    for target, source in tied.items():
        name = target.removesuffix(".weight")
        other = source.removesuffix(".weight")
        if name not in packed and other in packed and name in named_linears(model):
            found[name] = other

    return found


def untie_packed(model: Any, matched: Iterable[str]) -> None:
    """Takes packed modules out of the model's ties: they have no `weight` to share, in whatever
    direction.

    A head that is packed although its config ties it to the embeddings is used as the head it is;
    the config then says so.
    """
    packed = set(matched)
    head = output_head(model)
    if any(module is head and name in packed for name, module in model.named_modules()):
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False

    tied = getattr(model, "all_tied_weights_keys", None)
    if tied:
        weights = {f"{name}.weight" for name in packed}
        model.all_tied_weights_keys = {
            k: v for k, v in tied.items() if k not in weights and v not in weights
        }


def restore_packed(model: Any, matched: dict[str, str], packed: PackedTensors) -> None:
    """Reads tensors again that transformers has cast on the way in.

    4.x casts scales to the model's dtype, and bfloat16 loses three of their bits; 5.0 casts
    whatever lies in a module that the model keeps in float32 (T5's `wo`), codes included.
    """
    of_files = {getattr(torch, name) for name in stored_dtypes()}
    for name, stored in matched.items():
        module = model.get_submodule(name)
        for kind, buffer in list(module._buffers.items()):
            if kind == "bias" or buffer is None or buffer.is_meta or buffer.dtype in of_files:
                continue

            if stored in packed:
                with safe_open(packed[stored][kind]["file"], "pt") as file:
                    tensor = file.get_tensor(f"{stored}.{kind}")
            elif buffer.dtype != torch.bfloat16 and _is_float(kind, module.format):
                tensor = buffer
            else:
                raise CheckpointError(
                    f"{name}: its {kind} were cast to {buffer.dtype} while loading; load in "
                    "float16 or float32."
                )

            if tensor.is_floating_point():
                tensor = tensor.half()
            module._buffers[kind] = tensor.to(buffer.device)


def _is_float(kind: str, format: str) -> bool:
    """Whether a format keeps a packed tensor in float16, and not as integers."""
    _, dtype = get_format(format).shapes(256, 256, 128)[kind]
    return dtype.is_floating_point


def check_loaded(model: Any, matched: dict[str, str], packed: PackedTensors) -> None:
    """Compares the first and the last packed linear with the files.

    transformers only warns about weights it did not find a place for, and goes on with random ones.
    Raises CheckpointError.
    """
    from_files = [name for name in matched if matched[name] in packed]
    for name in from_files[:: max(1, len(matched) - 1)]:
        codes = model.get_submodule(name).qweight
        stored = matched[name]
        if codes.is_meta:
            continue
        with safe_open(packed[stored]["qweight"]["file"], "pt") as file:
            expected = file.get_tensor(f"{stored}.qweight")
            if codes.dtype != expected.dtype or not torch.equal(codes.cpu(), expected):
                raise CheckpointError(
                    f"transformers did not load {stored} of the checkpoint into "
                    f"{type(model).__name__}.{name}; load it with the class that config.json names "
                    "under architectures."
                )
