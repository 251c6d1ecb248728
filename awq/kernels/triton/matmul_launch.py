"""Products with 4-bit weights on a GPU: a fused kernel for few tokens, a dense weight and cuBLAS or
rocBLAS for many."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.formats.planar import padded
from awq.kernels.packed import Packed, Shape
from awq.kernels.triton import matmul
from awq.kernels.triton.configs import GATE_INTERLEAVE, Config, config_for
from awq.kernels.triton.direct_launch import form_for
from awq.kernels.triton.direct_launch import product as direct_product
from awq.kernels.triton.launcher import (
    Launcher,
    architecture,
    counters,
    has_assembly,
    has_dependent_launch,
    on_device,
)

MAX_FUSED_TOKENS = 4096
DEQUANTIZED_ROWS = 64  # of a weight, by one program
# made at a time. Pieces that fit the L2 cache were slower: their products are too small.
MAX_DENSE_BYTES = 512 << 20


@cache
def _config(index: int | None, shape: Shape, tokens: int, dtype: torch.dtype) -> Config | None:
    return config_for(*architecture(index), shape, tokens, dtype)


def config_of(x: Tensor, shape: Shape, tokens: int) -> Config | None:
    """The configuration of a product for so many rows of x's dtype on its GPU; None: a dense weight
    is better."""
    if x.dtype == torch.float32 or tokens > MAX_FUSED_TOKENS:
        return None
    return _config(x.device.index, shape, tokens, x.dtype)


def linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x [..., in] → [..., out] in x's dtype."""
    shape = packed.shape
    rows = x.reshape(-1, shape.in_features)
    tokens = rows.shape[0]
    if tokens == 0:
        return x.new_empty(*x.shape[:-1], shape.out_features)

    out = product(rows, packed, bias)
    out = through_dense(rows, packed, bias) if out is None else out

    return out.view(*x.shape[:-1], shape.out_features)


def product(x: Tensor, packed: Packed, bias: Tensor | None, gated: str = "") -> Tensor | None:
    """x [tokens, in] → [tokens, out], or with an activation [tokens, out/2] as `fused` does, in the
    way that is the fastest; None where a dense weight is, which knows no activation."""
    tokens = x.shape[0]
    form = None if x.dtype == torch.float32 else form_for(x.device.index, packed.shape, tokens)
    if form is not None:
        return direct_product(x, packed, bias, form, gated)

    config = config_of(x, packed.shape, tokens)
    return None if config is None else fused(x, packed, bias, config, gated)


@cache
def _matmul(
    index: int | None,
    dtype: torch.dtype,
    shape: Shape,
    config: Config,
    bias: torch.dtype | None,
    gated: str,
) -> Launcher:
    """One per kernel that Triton compiles: dtypes of x and of the bias are among what it compiles
    for."""
    constants = (
        shape.out_features,
        shape.in_features,
        shape.group_size,
        padded(*shape[:2])[1],
        config.bm,
        config.bn,
        config.split,
        config.scale_weight,
        bias is not None,
        has_assembly(index),
        has_dependent_launch(index),
        config.ahead(shape.in_features),
        gated,
        GATE_INTERLEAVE,
    )
    return Launcher(
        matmul.matmul_kernel, index, constants, num_warps=config.warps, num_stages=config.stages
    )


@cache
def _dequantize(index: int | None, dtype: torch.dtype, shape: Shape) -> Launcher:
    rows = padded(*shape[:2])[1]
    constants = (
        shape.in_features,
        shape.group_size,
        rows,
        DEQUANTIZED_ROWS,
        has_dependent_launch(index),
    )
    return Launcher(matmul.dequantize_kernel, index, constants, num_warps=4)


def fused(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    config: Config,
    gated: str = "",
) -> Tensor:
    """x [tokens, in] (float16 or bfloat16) → [tokens, out] without a dense weight.

    gated: the name of an activation, for a weight whose outputs are gate and up in turn,
    `GATE_INTERLEAVE` of each: the result is act(gate) · up [tokens, out/2].
    """
    shape = packed.shape
    device = x.device
    x = x.contiguous()
    tokens = x.shape[0]
    y = x.new_empty((tokens, shape.out_features // (2 if gated else 1)))
    kernel = _matmul(
        device.index, x.dtype, shape, config, None if bias is None else bias.dtype, gated
    )
    grid = (-(-shape.out_features // config.bn), config.split, -(-tokens // config.bm))
    partial = arrived = y

    with on_device(device):
        if config.split > 1:
            partial = x.new_empty((config.split, tokens, shape.out_features), dtype=torch.float32)
            arrived = counters(device).take(grid[0] * grid[2])
        kernel(
            grid,
            (x, packed.qweight, packed.scales, y if bias is None else bias, y, partial, arrived),
            tokens,
        )

    return y


def through_dense(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x [tokens, in] → [tokens, out] by dense weights of some rows at a time."""
    shape = packed.shape
    bias = None if bias is None else bias.to(x.dtype)
    step = max(64, MAX_DENSE_BYTES // (shape.in_features * x.element_size()) // 64 * 64)
    if step >= shape.out_features:
        return F.linear(x, dequantize(packed, x.dtype), bias)

    y = x.new_empty((x.shape[0], shape.out_features))
    dense = x.new_empty((step, shape.in_features))
    for start in range(0, shape.out_features, step):
        stop = min(start + step, shape.out_features)
        part = dense[: stop - start]
        _dequantize_into(part, packed, start)

        if bias is None:
            torch.mm(x, part.t(), out=y[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x, part.t(), out=y[:, start:stop])

    return y


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dense weight [out, in]."""
    size = (packed.shape.out_features, packed.shape.in_features)
    dense = torch.empty(size, dtype=dtype, device=packed.qweight.device)
    _dequantize_into(dense, packed, 0)
    return dense


def _dequantize_into(dense: Tensor, packed: Packed, first: int) -> None:
    """Rows `first` … of the weight into dense [rows, in]."""
    grid = (-(-dense.shape[0] // DEQUANTIZED_ROWS), packed.qweight.shape[0], 1)
    kernel = _dequantize(dense.device.index, dense.dtype, packed.shape)
    with on_device(dense.device):
        kernel(grid, (packed.qweight, packed.scales, dense), first, first + dense.shape[0])
