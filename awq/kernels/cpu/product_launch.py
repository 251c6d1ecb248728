"""Starting the kernel of `products`."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from awq.kernels.cpu.engine import Program, host_target, program
from awq.kernels.cpu.pool import team_size
from awq.kernels.cpu.products import PRODUCT, emit_linear
from awq.kernels.packed import Packed

MAX_CHUNK_INPUTS = 256  # that share one step of the activations
MAX_SERIAL_VALUES = 1 << 16  # activations that one thread makes bytes of sooner than two
MAX_CACHED_BYTES = 1 << 19  # of activations that a core keeps near


class Product:
    """x times a packed weight.

    kernel: of `emit_linear`, for x's dtype, which it takes as integers of `planes` bytes.
    """

    def __init__(self, kernel: Program, planes: int) -> None:
        self.kernel = kernel
        self.planes = planes

    def __call__(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        """x [..., in] → [..., out], in the threads that torch uses."""
        inputs, outputs, group = packed.shape
        planes = self.planes
        x = x.contiguous()
        tokens = x.numel() // inputs
        chunk = chunk_of(group)
        y = x.new_empty(*x.shape[:-1], outputs)
        if bias is not None:
            bias = bias.to(x.dtype).contiguous()

        plane_bytes = tokens * planes * inputs
        step_bytes = tokens * (inputs // chunk) * 4
        scratch = torch.empty(plane_bytes + 2 * step_bytes, dtype=torch.uint8)
        start = scratch.data_ptr()
        threads = team_size()
        task = PRODUCT.pack(
            quantize_threads=threads if tokens * inputs > MAX_SERIAL_VALUES else 1,
            threads=threads,
            x=x,
            y=y,
            codes=packed.qweight,
            scales=packed.scales,
            zeros=packed.qzeros,
            bias=bias,
            planes=start,
            steps=start + plane_bytes,
            sums=start + plane_bytes + step_bytes,
            tokens=tokens,
            inputs=inputs,
            outputs=outputs,
            group=group,
            chunk=chunk,
            cached=max(8, MAX_CACHED_BYTES // (planes * inputs) // 8 * 8),
        )
        self.kernel(task)

        return y


def product(dtype: torch.dtype, planes: int) -> Product:
    """The product on this CPU for activations of `dtype`. Raises what LLVM raises."""
    return Product(program(emit_linear, dtype, host_target(), planes), planes)


@cache
def chunk_of(group: int) -> int:
    """Inputs that share one step of the activations: the group, or the largest even part of it, by
    eights, up to 256."""
    return group if group <= MAX_CHUNK_INPUTS else _largest_part(group)


def _largest_part(group: int) -> int:
    return max(part for part in range(8, MAX_CHUNK_INPUTS + 1, 8) if group % part == 0)
