"""Starting the kernels of `held`, and for which products they are the better ones."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from awq.formats.planar import padded
from awq.kernels.packed import Packed, Shape
from awq.kernels.triton import held
from awq.kernels.triton.configs import GATE_INTERLEAVE
from awq.kernels.triton.launcher import (
    Launcher,
    architecture,
    has_assembly,
    has_dependent_launch,
    on_device,
)

COLUMNS = 8  # the fewest that tensor cores take
BLOCK = 128  # inputs of a block of the planar layout
MOST_BLOCKS = 32  # of inputs that a program holds: more do not fit the registers
MOST_WEIGHTS = 5120 * 2048  # of a linear: the largest that was measured
MOST_PROGRAMS = 4  # for each multiprocessor, so that all of them hold their weights at once


class Held(NamedTuple):
    """bn: rows of the weight that a program holds. warps: of a program."""

    bn: int
    warps: int


EXPERT_FORM = Held(32, 4)


def fits(shape: Shape) -> bool:
    """Whether all inputs of a tile can be the batch of one product: a scale for each block."""
    return shape.group_size % BLOCK == 0 or shape.group_size >= shape.in_features


def form_of(shape: Shape, gated: str = "") -> Held:
    """What a program holds of a weight that is small enough. With an activation, that is as many
    rows of the gate as of up: `GATE_INTERLEAVE` of each, or more."""
    if blocks_of(shape) > MOST_BLOCKS // 2:
        return Held(32, 8)
    return Held(32, 4) if gated else Held(16, 4)


@cache
def form_for(index: int | None, shape: Shape, tokens: int, gated: str = "") -> Held | None:
    """How the product of one token is held; None where the kernels that load in steps are better,
    or where nothing was measured."""
    name, _ = architecture(index)
    measured = name == "sm90" and tokens == 1 and fits(shape)
    few = shape.in_features * shape.out_features <= MOST_WEIGHTS
    if not measured or not few or blocks_of(shape) > MOST_BLOCKS:
        return None
    return form_of(shape, gated)


@cache
def expert_form_for(index: int | None, shape: Shape, tokens: int, top: int) -> Held | None:
    """`form_for` for the second product of `top` experts; the first does better in steps."""
    name, processors = architecture(index)
    measured = name == "sm90" and tokens == 1
    if not measured or not fits(shape):
        return None
    if blocks_of(shape) > MOST_BLOCKS // 2:
        return None

    tiles = -(-shape.out_features // EXPERT_FORM.bn)
    room = MOST_PROGRAMS * processors

    return EXPERT_FORM if top * tiles <= room else None


def _result(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Where a kernel writes. Weights are read before the wait for what ran before, which may just
    have written them. In a captured step it has not; else an ordinary kernel comes in between."""
    if x.is_cuda and not torch.cuda.is_current_stream_capturing():
        return x.new_zeros(shape)
    return x.new_empty(shape)


def product(x: Tensor, packed: Packed, bias: Tensor | None, form: Held, gated: str = "") -> Tensor:
    """As `matmul_launch.fused`, for x of at most `COLUMNS` rows and a shape that `fits`."""
    shape = packed.shape
    device = x.device
    x = x.contiguous()
    tokens = x.shape[0]
    y = _result(x, (tokens, shape.out_features // (2 if gated else 1)))
    kernel = _product(
        device.index, x.dtype, shape, form, None if bias is None else bias.dtype, gated
    )

    with on_device(device):
        tensors = (x, packed.qweight, packed.scales, y if bias is None else bias, y)
        kernel((-(-shape.out_features // form.bn), 1, 1), tensors, tokens)

    return y


def expert_product(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor | None,
    form: Held,
    gated: str = "",
    alternating: bool = False,
    chosen_before: bool = False,
) -> Tensor:
    """As `expert_launch.fused`, for experts [1, top_k] of one token and a shape that `fits`."""
    shape = packed.shape
    device = x.device
    _, top = experts.shape
    x = x.contiguous()
    experts = experts.contiguous()
    y = _result(x, (1, top, shape.out_features // (2 if gated else 1)))
    bias, weights = (None if t is None else t.contiguous() for t in (bias, weights))
    dtypes = tuple(None if t is None else t.dtype for t in (x, bias, weights, experts))
    sharing = top if x.dim() == 2 else 1
    rows = packed.qweight.shape[2]
    kernel = _experts(
        device.index, dtypes, shape, rows, sharing, form, gated, alternating, chosen_before
    )

    with on_device(device):
        tensors = (
            x,
            packed.qweight,
            packed.scales,
            y if bias is None else bias,
            y if weights is None else weights,
            experts,
            y,
        )
        grid = (top, -(-shape.out_features // form.bn), 1)
        kernel(grid, tensors, top, packed.qweight.shape[0])

    return y


def blocks_of(shape: Shape) -> int:
    """Blocks of inputs of a kernel, a power of two."""
    return triton.next_power_of_2(-(-shape.in_features // BLOCK))


@cache
def _product(
    index: int | None,
    dtype: torch.dtype,
    shape: Shape,
    form: Held,
    bias: torch.dtype | None,
    gated: str,
) -> Launcher:
    constants = (
        shape.out_features,
        shape.in_features,
        shape.group_size,
        padded(*shape[:2])[1],
        blocks_of(shape),
        COLUMNS,
        form.bn,
        bias is not None,
        has_assembly(index),
        gated,
        GATE_INTERLEAVE,
        has_dependent_launch(index),
    )
    return Launcher(held.held_kernel, index, constants, num_warps=form.warps, num_stages=1)


@cache
def _experts(
    index: int | None,
    dtypes: tuple[torch.dtype | None, ...],
    shape: Shape,
    padded_rows: int,
    sharing: int,
    form: Held,
    gated: str,
    alternating: bool,
    chosen_before: bool,
) -> Launcher:
    _, bias, weights, _ = dtypes
    constants = (
        sharing,
        shape.out_features,
        shape.in_features,
        shape.group_size,
        -(-shape.in_features // shape.group_size),
        padded_rows,
        blocks_of(shape),
        COLUMNS,
        form.bn,
        bias is not None,
        weights is not None,
        gated,
        alternating,
        GATE_INTERLEAVE,
        chosen_before,
        has_assembly(index),
        has_dependent_launch(index),
    )
    return Launcher(held.held_expert_kernel, index, constants, num_warps=form.warps, num_stages=1)
