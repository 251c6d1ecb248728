"""Starting the kernels of `experts`: which way rows find their blocks, sizes and scratch memory."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from awq.kernels.packed import Packed, Shape
from awq.kernels.reference import mixture as reference
from awq.kernels.triton import experts as kernels
from awq.kernels.triton.configs import GATE_INTERLEAVE, Config, config_for_experts
from awq.kernels.triton.direct_launch import (
    expert_form_for,
    expert_product,
    expert_sum,
    sum_form_for,
)
from awq.kernels.triton.launcher import (
    Launcher,
    architecture,
    counters,
    has_assembly,
    has_dependent_launch,
    on_device,
)

FEW = 128  # rows that find their blocks without sorting
ROUTE_CHUNK = 1024  # rows that a program of `route_kernel` looks at together


@cache
def _config(index: int | None, shape: Shape, rows: int, experts: int) -> Config:
    return config_for_experts(*architecture(index), shape, rows, experts)


def moe_linear(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor | None,
) -> Tensor:
    """See `awq.kernels.moe.moe_linear`; float16 and bfloat16."""
    rows = experts.numel()
    count = packed.qweight.shape[0]
    tokens, top = experts.shape
    shape = packed.shape
    if rows == 0:
        return x.new_zeros(
            (tokens, shape.out_features)
            if weights is not None
            else (tokens, top, shape.out_features)
        )

    y = fused(
        x, packed, bias, experts, weights, _config(x.device.index, shape, rows, count), rows <= FEW
    )
    return y if weights is None else y.sum(1)


def expert_parts(
    x: Tensor,
    first: Packed,
    second: Packed,
    biases: tuple[Tensor | None, Tensor | None],
    experts: Tensor,
    weights: Tensor,
    name: str,
    alternating: bool,
) -> Tensor:
    """Two kernels: gate, up and activation; down and the weights. A part for each of a token's
    experts, or their sum."""
    rows = experts.numel()
    if x.dtype == torch.float32 or rows == 0:
        return reference.expert_parts(x, first, second, biases, experts, weights, name, alternating)

    inner = _part(x, first, biases[0], experts, None, name, alternating)
    form = sum_form_for(x.device.index, second.shape, *experts.shape)
    if form is not None:
        return expert_sum(inner, second, biases[1], experts, weights, form, chosen_before=True)

    return _part(inner, second, biases[1], experts, weights, chosen_before=True)


def _part(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor | None,
    gated: str = "",
    alternating: bool = False,
    chosen_before: bool = False,
) -> Tensor:
    """`fused`, or through `direct`, whichever is the faster."""
    rows = experts.numel()
    index = x.device.index
    first = not chosen_before
    form = None
    if x.dtype != torch.float32:
        form = expert_form_for(index, packed.shape, *experts.shape, first, x.dtype)
    if form is not None:
        return expert_product(
            x, packed, bias, experts, weights, form, gated, alternating, chosen_before
        )

    config = _config(index, packed.shape, rows, packed.qweight.shape[0])
    return fused(
        x, packed, bias, experts, weights, config, rows <= FEW, gated, alternating, chosen_before
    )


def fused(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor | None,
    config: Config,
    few: bool,
    gated: str = "",
    alternating: bool = False,
    chosen_before: bool = False,
) -> Tensor:
    """[tokens, top_k, out], weighted but not summed. few: blocks are found without sorting.

    gated: the name of an activation; the result is then act(gate) · up [tokens, top_k, out/2], of a
    weight with all gates in front, or (alternating) gate and up in turn. chosen_before: the kernel
    in front has waited for `experts`, and did not make them.
    """
    shape = packed.shape
    device = x.device
    index = x.device.index
    tokens, top = experts.shape
    rows = tokens * top
    count = packed.qweight.shape[0]
    x = x.contiguous()
    experts = experts.contiguous()
    y = x.new_empty((tokens, top, shape.out_features // (2 if gated else 1)))
    tiles = -(-shape.out_features // config.bn)
    blocks = rows if few else rows // config.bm + min(rows, count)
    partial = arrived = y
    bias, weights = (None if t is None else t.contiguous() for t in (bias, weights))
    looked = 0 if not few else 1 if tokens == 1 else max(16, triton.next_power_of_2(rows))
    form = _Form(
        top if x.dim() == 2 else 1,
        looked,
        gated,
        alternating,
        config.ahead(shape.in_features) if chosen_before and few else 0,
    )
    dtypes = tuple(None if t is None else t.dtype for t in (x, bias, weights, experts))
    kernel = _experts(index, dtypes, shape, packed.qweight.shape[2], form, config)

    with on_device(device):
        if few:
            order = owner = experts
        else:
            order, owner = route(experts, count, config.bm, blocks)

        if config.split > 1:
            partial = x.new_empty((config.split, rows, tiles * config.bn), dtype=torch.float32)
            arrived = counters(device).take(blocks * tiles)

        first = (
            x,
            packed.qweight,
            packed.scales,
            y if bias is None else bias,
            y if weights is None else weights,
        )
        kernel(
            (blocks, tiles, config.split),
            (*first, experts, order, owner, y, partial, arrived),
            rows,
            count,
        )

    return y


class _Form(NamedTuple):
    """What else a kernel is compiled for; see `expert_kernel`: TOP, ROWS, GATED, ALTERNATING,
    AHEAD."""

    sharing: int
    looked: int
    gated: str
    alternating: bool
    ahead: int


@cache
def _experts(
    index: int | None,
    dtypes: tuple[torch.dtype | None, ...],
    shape: Shape,
    padded_rows: int,
    form: _Form,
    config: Config,
) -> Launcher:
    """dtypes: of x, bias, weights and experts, which are among what Triton compiles for."""
    _, bias, weights, _ = dtypes
    constants = (
        form.sharing,
        shape.out_features,
        shape.in_features,
        shape.group_size,
        -(-shape.in_features // shape.group_size),
        padded_rows,
        config.bm,
        config.bn,
        config.split,
        config.scale_weight,
        form.looked,
        bias is not None,
        weights is not None,
        form.gated,
        form.alternating,
        GATE_INTERLEAVE,
        form.ahead,
        has_assembly(index),
        has_dependent_launch(index),
    )
    return Launcher(
        kernels.expert_kernel, index, constants, num_warps=config.warps, num_stages=config.stages
    )


@cache
def _route(index: int | None, dtype: torch.dtype, bins: int, bm: int) -> Launcher:
    constants = (bins, bm, ROUTE_CHUNK, has_dependent_launch(index))
    return Launcher(kernels.route_kernel, index, constants, num_warps=4)


def route(experts: Tensor, count: int, bm: int, blocks: int) -> tuple[Tensor, Tensor]:
    """(order [blocks · bm], owner [blocks]) of `route_kernel` for experts [tokens, top_k] out of
    `count`."""
    device = experts.device
    order = torch.empty(blocks * bm, dtype=torch.int32, device=device)
    owner = torch.empty(blocks, dtype=torch.int32, device=device)
    programs = count + 1  # one for each expert, and one for the blocks that are left over
    width = triton.next_power_of_2(programs)
    kernel = _route(device.index, experts.dtype, width, bm)
    kernel(
        (programs, 1, 1),
        (experts, order, owner),
        experts.numel(),
        count,
        blocks,
    )

    return order, owner
