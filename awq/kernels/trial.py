"""A small product with a known result, for backends that stand on a library: some pairs of library
and CPU compute wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from awq.core.weight import QuantizedWeight
from awq.formats import get_layout
from awq.kernels import reference
from awq.kernels.packed import Packed, Shape


def trial_error(
    product: Callable[[Tensor, Packed], Tensor],
    layout: str,
    dtype: torch.dtype,
    tokens: Iterable[int],
) -> float:
    """Largest relative error of `product(x [tokens, in], packed in `layout`)` on the CPU, over
    numbers of tokens.

    The weight has every code and zero point, an odd number of blocks of rows, and several groups.
    Not a number is infinite.
    """
    generator = torch.Generator().manual_seed(0)
    shape = Shape(256, 72, 64)
    codes = torch.randint(0, 16, (72, 256), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (72, 4), generator=generator, dtype=torch.uint8)
    weight = QuantizedWeight(
        codes, (torch.rand(72, 4, generator=generator, dtype=torch.float32) + 0.1).half(), zeros
    )
    tensors = get_layout(layout).pack(weight)
    packed = Packed(tensors["qweight"], tensors["qzeros"], tensors["scales"], shape, layout)
    dense = weight.dequantize().double()
    worst = 0.0

    for count in tokens:
        x = torch.randn(count, 256, generator=generator).to(dtype)
        expected = reference.product(x.double(), dense, None)
        error = (product(x, packed).double() - expected).norm() / expected.norm()
        worst = max(worst, float(error.nan_to_num(float("inf"))))

    return worst
