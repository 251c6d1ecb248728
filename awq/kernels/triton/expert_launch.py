"""Starting the kernels of `experts`: which way rows find their blocks, sizes and scratch memory."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from awq.kernels.packed import Packed, Shape
from awq.kernels.triton import experts as kernels
from awq.kernels.triton.configs import Config, config_for_experts
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
    x: Tensor, packed: Packed, bias: Tensor | None, experts: Tensor, weights: Tensor | None
) -> Tensor:
    """See `awq.kernels.moe.moe_linear`; float16 and bfloat16."""
    rows, count = experts.numel(), packed.qweight.shape[0]
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


def fused(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor | None,
    config: Config,
    few: bool,
) -> Tensor:
    """[tokens, top_k, out], weighted but not summed. few: blocks are found without sorting."""
    shape, device, index = packed.shape, x.device, x.device.index
    tokens, top = experts.shape
    rows, count = tokens * top, packed.qweight.shape[0]
    x, experts = x.contiguous(), experts.contiguous()
    y = x.new_empty((tokens, top, shape.out_features))
    tiles = -(-shape.out_features // config.bn)
    blocks = rows if few else rows // config.bm + min(rows, count)
    partial = arrived = y
    bias, weights = (None if t is None else t.contiguous() for t in (bias, weights))
    dtypes = tuple(None if t is None else t.dtype for t in (x, bias, weights, experts))
    looked = max(16, triton.next_power_of_2(rows)) if few else 0
    sharing = top if x.dim() == 2 else 1  # rows that read one row of x
    kernel = _experts(
        index,
        dtypes,
        shape,
        packed.scales.shape[1],
        packed.qweight.shape[2],
        sharing,
        config,
        looked,
    )
    with on_device(device):
        if few:
            order = owner = experts
        else:
            order, owner = route(experts, count, config.bm, blocks)
        if config.split > 1:
            partial = x.new_empty((config.split, rows, shape.out_features), dtype=torch.float32)
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
        )
    return y


@cache
def _experts(
    index: int | None,
    dtypes: tuple[torch.dtype | None, ...],
    shape: Shape,
    groups: int,
    padded_rows: int,
    sharing: int,
    config: Config,
    looked: int,
) -> Launcher:
    """dtypes: of x, bias, weights and experts, which are among what Triton compiles for. looked:
    rows, when few."""
    _, bias, weights, _ = dtypes
    constants = (
        sharing,
        shape.out_features,
        shape.in_features,
        shape.group_size,
        groups,
        padded_rows,
        config.bm,
        config.bn,
        config.split,
        config.scale_weight,
        looked,
        bias is not None,
        weights is not None,
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
    order = torch.empty(blocks * bm, dtype=torch.int32, device=experts.device)
    owner = torch.empty(blocks, dtype=torch.int32, device=experts.device)
    kernel = _route(experts.device.index, experts.dtype, triton.next_power_of_2(count + 1), bm)
    kernel((count + 1, 1, 1), (experts, order, owner), experts.numel(), count, blocks)
    return order, owner
