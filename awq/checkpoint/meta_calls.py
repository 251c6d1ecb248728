"""Calls of blocks that have no weights: what they return, in structure and shapes only.

A walk over a model asks which of its blocks are reached and what they return, and needs no values
for that. So a block that stands on the meta device runs there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from awq.errors import ModelError
from awq.nn.block_calls import map_tensors

logger = logging.getLogger("awq.checkpoint")


def call_as_shapes(block: nn.Module, like: nn.Module | None = None) -> None:
    """Calls of `block` give zeros in the structure and shapes of its output.

    like: a block on the meta device that returns the same; None: the block itself.
    """
    block.forward = partial(_structure_of_output, block if like is None else like)


def refuse_calls(block: nn.Module, name: str) -> None:
    """Calls of `block` raise ModelError: it is written and has left."""
    block.forward = partial(_gone, name)


def _structure_of_output(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Zeros in the structure and shapes of the block's output."""
    forward = type(block).forward
    try:
        on_meta = map_tensors((args, kwargs), lambda tensor: tensor.to("meta"))
        output = forward(block, *on_meta[0], **on_meta[1])
    except Exception as error:  # routing by values has none on the meta device
        logger.debug("%s cannot run without values: %s", type(block).__name__, error)
        with _zero_weights(block):
            output = forward(block, *args, **kwargs)
    return map_tensors(output, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))


@contextmanager
def _zero_weights(block: nn.Module) -> Iterator[None]:
    """Zeros that take no memory in place of the tensors on the meta device."""
    replaced: list[tuple[Any, str, Tensor]] = []
    for module in block.modules():
        held: tuple[Any, ...] = (module._parameters, module._buffers)
        for tensors in held:
            for name, tensor in list(tensors.items()):
                if tensor is not None and tensor.is_meta:
                    replaced.append((tensors, name, tensor))
                    zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(zeros, False) if is_parameter else zeros

    try:
        yield
    finally:
        for tensors, name, tensor in replaced:
            tensors[name] = tensor


def _gone(name: str, *_args: Any, **_kwargs: Any) -> Any:
    raise ModelError(f"{name} is quantized and written; it cannot be run any more.")
