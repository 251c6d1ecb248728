"""`awq::linear`, the one operator behind every quantized linear: visible to torch.compile, differentiable in x."""

from __future__ import annotations

import torch
from torch import Tensor

from awq.kernels import reference


@torch.library.custom_op("awq::linear", mutates_args=())
def _linear(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None,
    in_features: int, out_features: int, group_size: int, format: str,
) -> Tensor:  # fmt: skip
    weight = reference.dequantize(qweight, qzeros, scales, in_features, out_features, group_size, format)
    return reference.linear(x, weight, bias)


@_linear.register_fake
def _(x, qweight, qzeros, scales, bias, in_features, out_features, group_size, format):
    return x.new_empty(*x.shape[:-1], out_features)


def _setup_context(ctx, inputs, output) -> None:
    x, qweight, qzeros, scales, bias, *shape = inputs
    ctx.save_for_backward(qweight, qzeros, scales)
    ctx.shape, ctx.bias_dtype = shape, None if bias is None else bias.dtype


def _backward(ctx, grad: Tensor):
    """Gradient of x (for LoRA on top of frozen weights) and of the bias; the packed weight has none."""
    weight = reference.dequantize(*ctx.saved_tensors, *ctx.shape)
    grad_bias = None if ctx.bias_dtype is None else grad.reshape(-1, grad.shape[-1]).float().sum(0).to(ctx.bias_dtype)
    return reference.linear(grad, weight.t(), None), None, None, None, grad_bias, None, None, None, None


_linear.register_autograd(_backward, setup_context=_setup_context)


def quantized_linear(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None,
    in_features: int, out_features: int, group_size: int, format: str,
) -> Tensor:  # fmt: skip
    """x [..., in] → [..., out] in x's dtype, through packed weights of `format`; any rank is kept."""
    return torch.ops.awq.linear(x, qweight, qzeros, scales, bias, in_features, out_features, group_size, format)
