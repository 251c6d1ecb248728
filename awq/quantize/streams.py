"""Residual streams: to what a linear's output is added, found by looking at one forward.

A linear at the end of attention or of an MLP does not speak for itself: its output is added to what
the block carries along, and that sum is what later layers read. When the stream has drifted from
the original model's, the linear's codes can make up for part of the drift
(`awq.quantize.input_error`), because the same drift stands in what the linear reads.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from awq.nn.block_calls import BlockCall
from awq.nn.hooks import hooked

TOLERANCE = 1e-3  # of the linear's output: streams carry values a thousand times as large


class Stream(NamedTuple):
    """reader: name of a module whose first argument is the stream; factor: stream + factor · output
    is what goes on."""

    reader: str
    factor: float


@torch.no_grad()
def find_streams(
    block: nn.Module,
    names: Collection[str],
    call: BlockCall,
    hidden: Tensor,
) -> dict[str, Stream]:
    """The streams to which the linears `names` add their outputs; linears that add to none are left
    out.

    hidden: float32 [batch, tokens, features] before the block.
    """
    inputs: list[tuple[str, Tensor]] = []  # in the order of the calls
    # name → output, and how many inputs were read before it
    outputs: dict[str, tuple[Tensor, int]] = {}

    def note_input(name: str, args: tuple) -> None:
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            inputs.append((name, args[0].clone()))

    def note_output(name: str, output: Any) -> None:
        outputs[name] = output.clone(), len(inputs)

    readers = [name for name, _ in block.named_modules() if name]
    with hooked(block, readers, before=note_input), hooked(block, names, after=note_output):
        last = call.run(block, hidden)

    found = {}
    for name, (output, count) in outputs.items():
        sums = [value for _, value in inputs[count:]] + [last]
        stream = _stream_of(output, inputs[:count], sums)
        if stream is not None:
            found[name] = stream

    return found


def _stream_of(
    output: Tensor,
    before: list[tuple[str, Tensor]],
    sums: list[Tensor],
) -> Stream | None:
    """The first input before a linear's output, and the factor, with which one of the sums is
    explained."""
    energy = float(output.pow(2).sum())
    if energy == 0:
        return None

    for reader, stream in before:
        if stream.shape != output.shape:
            continue
        for total in sums:
            if total.shape != output.shape:
                continue

            change = total - stream
            factor = float((change * output).sum()) / energy
            rest = float((change - factor * output).norm())
            if abs(factor) > TOLERANCE and rest <= TOLERANCE * abs(factor) * energy**0.5:
                return Stream(reader, 1.0 if abs(factor - 1) < TOLERANCE else factor)

    return None


def stream_error(now: Tensor, original: Tensor, factor: float) -> Tensor:
    """What a linear's output must add to bring the stream back: (original − now) / factor, float32
    [..., features]."""
    return (original.float() - now.float()) / factor
