"""Starting the kernels of `experts`: which way rows find their blocks, sizes and scratch memory."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from awq.kernels.packed import Packed, Shape
from awq.kernels.triton import experts as kernels
from awq.kernels.triton.configs import Config, config_for_experts
from awq.kernels.triton.launch import _on, architecture, counters, has_assembly, has_dependent_launch

FEW = 128  # rows that find their blocks without sorting


@cache
def _config(index: int | None, shape: Shape, rows: int, experts: int) -> Config:
    return config_for_experts(*architecture(index), shape, rows, experts)


def moe_linear(x: Tensor, packed: Packed, bias: Tensor | None, experts: Tensor, weights: Tensor | None) -> Tensor:
    """See `awq.kernels.moe.moe_linear`; float16 and bfloat16."""
    rows, count = experts.numel(), packed.qweight.shape[0]
    tokens, top = experts.shape
    shape = packed.shape
    if rows == 0:
        return x.new_zeros((tokens, shape.out_features) if weights is not None else (tokens, top, shape.out_features))
    y = fused(x, packed, bias, experts, weights, _config(x.device.index, shape, rows, count), rows <= FEW)
    return y if weights is None else y.sum(1)


def fused(
    x: Tensor, packed: Packed, bias: Tensor | None, experts: Tensor, weights: Tensor | None, config: Config, few: bool
) -> Tensor:
    """[tokens, top_k, out], weighted but not summed. few: blocks are found without sorting."""
    shape, device, index = packed.shape, x.device, x.device.index
    tokens, top = experts.shape
    rows, count = tokens * top, packed.qweight.shape[0]
    x, experts = x.contiguous(), experts.contiguous()
    y = x.new_empty((tokens, top, shape.out_features))
    tiles = -(-shape.out_features // config.bn)
    blocks = rows if few else rows // config.bm + min(rows, count)
    pdl, partial, arrived = has_dependent_launch(index), y, y
    bias, weights = (None if t is None else t.contiguous() for t in (bias, weights))
    with _on(device):
        if few:
            order = owner = experts
        else:
            order, owner = route(experts, count, config.bm, blocks)
        if config.split > 1:
            partial = x.new_empty((config.split, rows, shape.out_features), dtype=torch.float32)
            arrived = counters(device).take(blocks * tiles)
        kernels.expert_kernel[(blocks, tiles, config.split)](
            x, packed.qweight, packed.scales, y if bias is None else bias, y if weights is None else weights,
            experts, order, owner, y, partial, arrived, rows,
            top if x.dim() == 2 else 1, shape.out_features, shape.in_features, shape.group_size, packed.scales.shape[1],
            packed.qweight.shape[2], config.bm, config.bn, config.split, config.scale_weight,
            max(16, triton.next_power_of_2(rows)) if few else 0, bias is not None, weights is not None, has_assembly(index), pdl,
            num_warps=config.warps, num_stages=config.stages, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return y


def route(experts: Tensor, count: int, bm: int, blocks: int) -> tuple[Tensor, Tensor]:
    """(order [blocks · bm], owner [blocks]) of `route_kernel` for experts [tokens, top_k] out of `count`."""
    order = torch.empty(blocks * bm, dtype=torch.int32, device=experts.device)
    owner = torch.empty(blocks, dtype=torch.int32, device=experts.device)
    pdl = has_dependent_launch(experts.device.index)
    kernels.route_kernel[(count + 1,)](
        experts, order, owner, experts.numel(), count, blocks, triton.next_power_of_2(count + 1), bm, 1024, pdl,
        num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return order, owner
