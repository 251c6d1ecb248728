"""The Triton backend: GPUs of NVIDIA (compute capability 8.0 and up) and AMD, with no compiled
extension to install.

Triton is an optional dependency; it is imported at the first use only. Kernels: `matmul`,
`direct`, `decoding`, `routing`, `experts`, `search` and `rounding`, each started by its `…_launch`
through the one `launcher`. `configs`: which configuration for which shape and GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awq._triton import INTERPRETED, triton_problem
from awq.kernels.packed import Packed, Shape

LAYOUT = "planar"
_DECODE = ("add_norm", "activate", "gated", "split", "attend", "gate_interleave", "choose_token")
_SEARCH = ("best_range", "scaled_losses", "round_block", "descend_block")
OPERATORS = (
    dict.fromkeys(_DECODE, "awq.kernels.triton.decode_launch")
    | dict.fromkeys(("route", "add_norm_route"), "awq.kernels.triton.routing_launch")
    | {"expert_parts": "awq.kernels.triton.expert_launch"}
    | dict.fromkeys(_SEARCH, "awq.kernels.triton.search_launch")
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(device: torch.device, dtype: torch.dtype, shape: Shape | None) -> str | None:
    """Why Triton cannot serve this linear; see `awq.backends`."""
    if device.type != "cuda" and not (device.type == "cpu" and INTERPRETED):
        return f"its kernels run on NVIDIA and AMD GPUs, and the weights are on {device.type}"
    if dtype not in _DTYPES:
        return f"activations are {dtype}; it takes float16, bfloat16 and float32"
    if shape is not None and shape.group_size % 32 and shape.group_size != shape.in_features:
        return f"group_size {shape.group_size} is neither a multiple of 32 nor the whole row"
    return triton_problem(device)


def linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x [..., in] → [..., out] in x's dtype: a fused product for few tokens, a dense weight and
    cuBLAS or rocBLAS for many."""
    from awq.kernels.triton import matmul_launch

    return matmul_launch.linear(x, packed, bias)


def moe_linear(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor | None,
) -> Tensor | None:
    """See `awq.kernels.moe`; None for float32, which goes expert by expert, like the dense product
    it is."""
    from awq.kernels.triton import expert_launch

    if x.dtype == torch.float32:
        return None
    return expert_launch.moe_linear(x, packed, bias, experts, weights)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dense weight [out, in] of `dtype`, rounded once from float32."""
    from awq.kernels.triton import matmul_launch

    return matmul_launch.dequantize(packed, dtype)
