"""Starting the Triton kernels: sizes, scratch memory and streams. Host time counts here: a decode step starts hundreds."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.formats.planar import padded
from awq.kernels.packed import Packed, Shape
from awq.kernels.triton import products
from awq.kernels.triton.configs import RUN, Config, config_for

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_ARENA = 1 << 20  # counters kept for CUDA graphs
_ROWS = 64  # of a weight that one program dequantizes
_CHUNK = 512 << 20  # bytes of dense weight made at a time. Pieces that fit the L2 cache were slower: their products are too small.


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
def has_dependent_launch(index: int | None) -> bool:
    """Whether a kernel may start before the one in front of it has ended (compute capability 9.0 and up)."""
    return has_assembly(index) and torch.cuda.get_device_capability(index) >= (9, 0)


@cache
def _config(index: int | None, shape: Shape, tokens: int, dtype: torch.dtype) -> Config | None:
    return config_for(*architecture(index), shape, tokens, dtype)


class Counters:
    """Zeroed int32 counters that kernels leave zeroed.

    Kernels that run at the same time must not share them. Eager calls take those of their stream, whose kernels run one after
    the other. Each call in a CUDA graph gets its own, for graphs may be replayed on any stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.streams, self.used = device, {}, 0  # type: ignore[var-annotated]
        self.arenas: list[Tensor] = []  # all of them are kept, for graphs hold their addresses

    def take(self, count: int) -> Tensor:
        """At least `count` counters for the current stream."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            if not self.arenas or self.used + count > _ARENA:
                return torch.zeros(count, dtype=torch.int32, device=self.device)  # correct, with a memset in the graph
            self.used += count
            return self.arenas[-1][self.used - count : self.used]
        if not self.arenas or self.used > _ARENA // 2:
            self.arenas.append(torch.zeros(_ARENA, dtype=torch.int32, device=self.device))
            self.used = 0
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # graphs may run on other streams; this happens once
        stream = _stream(self.device.index) if self.device.type == "cuda" else 0
        found = self.streams.get(stream)
        if found is None or found.numel() < count:
            found = self.streams[stream] = torch.zeros(max(count, 8192), dtype=torch.int32, device=self.device)
        return found


@cache
def counters(device: torch.device) -> Counters:
    return Counters(device)


def choice(x: Tensor, shape: Shape, tokens: int) -> Config | None:
    """The configuration of a product for so many rows of x's dtype on its GPU; None: a dense weight is better."""
    return None if x.dtype == torch.float32 or tokens > 4096 else _config(x.device.index, shape, tokens, x.dtype)


def linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x [..., in] → [..., out] in x's dtype."""
    shape = packed.shape
    rows = x.reshape(-1, shape.in_features)
    tokens = rows.shape[0]
    if tokens == 0:
        out = rows.new_empty(0, shape.out_features)
    elif (config := choice(x, shape, tokens)) is None:
        out = through_dense(rows, packed, bias)
    else:
        out = fused(rows, packed, bias, config)
    return out.view(*x.shape[:-1], shape.out_features)


class Started:
    """A kernel with its compile-time constants, on one GPU and for one set of dtypes.

    Triton's own launch looks at the type and value of every argument each time, at a cost of tens of microseconds of host time,
    which a prompt pays a hundred times. What it compiled is called directly from the second time on, as long as all pointers
    are aligned.
    """

    def __init__(self, kernel: Any, index: int | None, constants: tuple, options: dict[str, Any]) -> None:
        """constants: the kernel's last arguments; options: of its compilation."""
        self.kernel, self.index, self.constants = kernel, index, constants
        self.options = options | ({"launch_pdl": True} if has_dependent_launch(index) else {})
        self.compiled: Any = None

    def __call__(self, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], *numbers: float) -> None:
        """numbers: the arguments between tensors and constants; kernels must not be specialized on the value of integers."""
        aligned = self.index is not None and not any(t.data_ptr() & 15 for t in tensors)
        if self.compiled is not None and aligned:
            self.compiled[grid](*tensors, *numbers, *self.constants, stream=_stream(self.index))
            return
        compiled = self.kernel[grid](*tensors, *numbers, *self.constants, **self.options)
        if aligned:
            self.compiled = compiled


@cache
def _product(index: int | None, dtype: torch.dtype, shape: Shape, config: Config, bias: torch.dtype | None, gated: str) -> Started:
    """One per kernel that Triton compiles: dtypes of x and of the bias are among what it compiles for."""
    constants = (
        shape.out_features, shape.in_features, shape.group_size, padded(*shape[:2])[1], config.bm, config.bn, config.split,
        config.scale_weight, bias is not None, has_assembly(index), has_dependent_launch(index), config.ahead(shape.in_features),
        gated, RUN,
    )  # fmt: skip
    return Started(products.product_kernel, index, constants, {"num_warps": config.warps, "num_stages": config.stages})


@cache
def _dequantizing(index: int | None, dtype: torch.dtype, shape: Shape) -> Started:
    constants = (shape.in_features, shape.group_size, padded(*shape[:2])[1], _ROWS, has_dependent_launch(index))
    return Started(products.dequantize_kernel, index, constants, {"num_warps": 4})


def _stream(index: Any) -> int:
    return torch._C._cuda_getCurrentRawStream(index)  # as Inductor's code does; a `Stream` object costs microseconds


def fused(x: Tensor, packed: Packed, bias: Tensor | None, config: Config, gated: str = "") -> Tensor:
    """x [tokens, in] (float16 or bfloat16) → [tokens, out] without a dense weight.

    gated: the name of an activation, for a weight whose outputs are gate and up in turn, in runs of `RUN`: the
    result is act(gate) · up [tokens, out/2].
    """
    shape, device, index = packed.shape, x.device, x.device.index
    x = x.contiguous()
    tokens = x.shape[0]
    y = x.new_empty((tokens, shape.out_features // (2 if gated else 1)))
    product = _product(index, x.dtype, shape, config, None if bias is None else bias.dtype, gated)
    grid = (-(-shape.out_features // config.bn), config.split, -(-tokens // config.bm))
    partial = arrived = y
    with _on(device):
        if config.split > 1:
            partial = x.new_empty((config.split, tokens, shape.out_features), dtype=torch.float32)
            arrived = counters(device).take(grid[0] * grid[2])
        product(grid, (x, packed.qweight, packed.scales, y if bias is None else bias, y, partial, arrived), tokens)
    return y


def _on(device: torch.device) -> Any:
    """Makes `device` the current one, if it is not yet."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _NOTHING
    return torch.cuda.device(device)


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


def _dequantize_into(dense: Tensor, packed: Packed, first: int) -> None:
    """Rows `first` … of the weight into dense [rows, in]."""
    grid = (-(-dense.shape[0] // _ROWS), packed.qweight.shape[0], 1)
    with _on(dense.device):
        start = _dequantizing(dense.device.index, dense.dtype, packed.shape)
        start(grid, (packed.qweight, packed.scales, dense), first, first + dense.shape[0])
