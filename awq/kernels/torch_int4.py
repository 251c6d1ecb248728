"""torch's own 4-bit product on x86: what a 16-bit model gets on a CPU without llvmlite. It computes
in bfloat16.

A float32 model is not served: float32 means float32, and the reference gives it, slowly.

Few tokens: `_weight_int4pack_mm_for_cpu`, whose time grows with each token. Many: dense bfloat16
weights, some rows at a time, and an ordinary product.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from awq.errors import first_line
from awq.formats.int4pack import nibbles, row_order
from awq.kernels.packed import Packed, Shape
from awq.kernels.trial import trial_error

LAYOUT = "int4pack"
MANY = 256  # tokens from which dense weights are faster
_DTYPES = (torch.bfloat16, torch.float16)
_GROUPS = (32, 64, 128, 256)
_PIECE = 1 << 22  # weights that are dense at a time
_product: Any = getattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", None)


def why_not(device: torch.device, dtype: torch.dtype, shape: Shape) -> str | None:
    """Why torch's product cannot serve this linear; see `awq.backends`."""
    if device.type != "cpu":
        return f"it runs on CPUs, and the weights are on {device.type}"
    if dtype not in _DTYPES:
        return f"activations are {dtype}; it computes in bfloat16, and takes float16 and bfloat16"
    if shape.group_size not in _GROUPS:
        return (
            f"group_size is {shape.group_size}, and torch's product takes "
            f"{', '.join(map(str, _GROUPS))}"
        )
    return problem()


@cache
def problem() -> str | None:
    """Why torch's product cannot be trusted in this process, or None."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        return f"torch has fast code for AVX2 and AVX-512 only, and this CPU is {capability}"

    def product(x: Tensor, packed: Packed) -> Tensor:
        return linear(x, packed, None)

    try:
        error = trial_error(product, LAYOUT, torch.bfloat16, (1, 7, MANY))
    except Exception as failure:  # an operator without a promise to stay
        return f"torch's product failed: {type(failure).__name__} {first_line(failure)}"

    return None if error < 2e-2 else f"a trial product was wrong by {error:.3g}"


def linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x [..., in] → [..., out] in x's dtype."""
    shape = packed.shape
    rows = x.reshape(-1, packed.shape.in_features)
    if x.dtype != torch.bfloat16:
        rows = rows.to(torch.bfloat16)
    if len(rows) < MANY:
        out = _product(rows.contiguous(), packed.qweight, shape.group_size, packed.scales)
    else:
        out = _dense_product(rows, packed)

    if out.shape[1] != shape.out_features:
        out = out[:, : shape.out_features]
    if x.dtype != torch.bfloat16:
        out = out.to(x.dtype)
    if bias is not None:
        out = out + bias.to(x.dtype)

    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], shape.out_features)


def _dense_product(x: Tensor, packed: Packed) -> Tensor:
    """bfloat16 [tokens, in] → [tokens, N]."""
    inputs, _, group = packed.shape
    order = row_order()
    width = len(order)
    groups = inputs // group
    data = packed.qweight.view(-1, inputs, width // 2)
    blocks = len(data)
    pairs = packed.scales.view(groups, blocks, width, 2)
    in_order = pairs[:, :, order]

    # [block, groups, 1, width]; contiguous, or the product below takes 100 times as long
    scales, offsets = in_order.permute(3, 1, 0, 2).unsqueeze(3).contiguous()
    out = x.new_empty(len(x), blocks, width)
    step = max(1, _PIECE // (inputs * width))
    for first in range(0, blocks, step):
        part = slice(first, first + step)
        codes = nibbles(data[part]).view(-1, groups, group, width)
        centered = codes.to(torch.bfloat16).sub_(8)
        grouped = torch.addcmul(offsets[part], centered, scales[part])
        dense = grouped.view(-1, inputs, width)
        y = torch.matmul(x, dense)  # [blocks, tokens, width]
        out[:, part] = y.transpose(0, 1)

    return out[:, :, order.argsort()].view(len(x), -1)
