"""Starting the Triton kernels: sizes, scratch memory and streams. Host time counts here: a decode step starts hundreds."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.kernels.packed import Packed, Shape
from awq.kernels.triton import products
from awq.kernels.triton.configs import Config, config_for

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_ARENA = 1 << 20  # counters kept for CUDA graphs
_CHUNK = 32 << 20  # bytes of dense weight made at a time: it stays in the L2 cache until the product has read it


@cache
def architecture(index: int | None) -> tuple[str, int]:
    """("sm90" | "gfx942" …, multiprocessors) of a GPU; the interpreter stands for a small one."""
    if index is None:
        return "interpreter", 4
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm{properties.major}{properties.minor}", properties.multi_processor_count


@cache
def has_assembly(index: int | None) -> bool:
    """Whether kernels may hold NVIDIA's inline assembly."""
    return index is not None and torch.version.hip is None


@cache
def _config(index: int | None, shape: Shape, tokens: int) -> Config | None:
    return config_for(*architecture(index), shape, tokens)


class Counters:
    """Zeroed int32 counters that kernels leave zeroed.

    Kernels that run at the same time must not share them. Eager calls take those of their stream, whose kernels run one after
    the other. Each call in a CUDA graph gets its own, for graphs may be replayed on any stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.streams = device, {}  # type: ignore[var-annotated]
        self.arena, self.used = torch.zeros(_ARENA, dtype=torch.int32, device=device), 0

    def take(self, count: int) -> Tensor:
        """At least `count` counters for the current stream."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            if self.used + count > self.arena.numel():
                return torch.zeros(count, dtype=torch.int32, device=self.device)  # correct, with a memset in the graph
            self.used += count
            return self.arena[self.used - count : self.used]
        if self.used > _ARENA // 2:
            self.arena, self.used = torch.zeros(_ARENA, dtype=torch.int32, device=self.device), 0
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        found = self.streams.get(stream)
        if found is None or found.numel() < count:
            found = self.streams[stream] = torch.zeros(max(count, 8192), dtype=torch.int32, device=self.device)
        return found


@cache
def counters(device: torch.device) -> Counters:
    return Counters(device)


def linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x [..., in] → [..., out] in x's dtype."""
    shape = packed.shape
    rows = x.reshape(-1, shape.in_features)
    tokens = rows.shape[0]
    config = None
    if x.dtype != torch.float32 and tokens <= 4096:
        config = _config(x.device.index, shape, tokens)
    if tokens == 0:
        out = rows.new_empty(0, shape.out_features)
    elif config is None:
        out = through_dense(rows, packed, bias)
    else:
        out = fused(rows, packed, bias, config)
    return out.view(*x.shape[:-1], shape.out_features)


def fused(x: Tensor, packed: Packed, bias: Tensor | None, config: Config) -> Tensor:
    """x [tokens, in] (float16 or bfloat16) → [tokens, out] without a dense weight."""
    shape = packed.shape
    x = x.contiguous()
    tokens, outputs = x.shape[0], shape.out_features
    y = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    tiles, blocks = -(-outputs // config.bn), -(-tokens // config.bm)
    partial: Any = y
    arrived: Any = y
    if config.split > 1:
        partial = torch.empty((config.split, tokens, outputs), dtype=torch.float32, device=x.device)
        arrived = counters(x.device).take(tiles * blocks)
    with torch.cuda.device(x.device) if x.is_cuda else _NOTHING:
        products.product_kernel[tiles, config.split, blocks](
            x, packed.qweight, packed.qzeros, packed.scales, y if bias is None else bias, y, partial, arrived, tokens,
            outputs, shape.in_features, shape.group_size, packed.qweight.shape[1],
            config.bm, config.bn, config.split, config.scale_weight, bias is not None, has_assembly(x.device.index),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return y


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


_NOTHING = _Nothing()


def through_dense(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x [tokens, in] → [tokens, out] by dense weights of some rows at a time."""
    shape = packed.shape
    bias = None if bias is None else bias.to(x.dtype)
    step = max(64, _CHUNK // (shape.in_features * x.element_size()) // 64 * 64)
    if step >= shape.out_features:
        return F.linear(x, dequantize(packed, x.dtype), bias)
    y = torch.empty((x.shape[0], shape.out_features), dtype=x.dtype, device=x.device)
    dense = torch.empty((step, shape.in_features), dtype=x.dtype, device=x.device)
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
    dense = torch.empty((packed.shape.out_features, packed.shape.in_features), dtype=dtype, device=packed.qweight.device)
    _dequantize_into(dense, packed, 0)
    return dense


def _dequantize_into(dense: Tensor, packed: Packed, first: int, rows: int = 64) -> None:
    """Rows `first` … of the weight into dense [rows, in]."""
    shape = packed.shape
    grid = (-(-dense.shape[0] // rows), packed.qweight.shape[0])
    with torch.cuda.device(dense.device) if dense.is_cuda else _NOTHING:
        products.dequantize_kernel[grid](
            packed.qweight, packed.qzeros, packed.scales, dense, first,
            first + dense.shape[0], shape.in_features, shape.group_size, packed.qweight.shape[1], rows, num_warps=4,
        )  # fmt: skip
