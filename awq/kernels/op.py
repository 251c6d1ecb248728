"""`awq::linear`, the one operator behind every quantized linear: visible to torch.compile,
differentiable in x.

Its backward is an operator too (`awq::linear_input_grad`), so that a compiled backward does not
trace into a backend. Both are defined through `torch.library.Library`, which costs half the host
time of `torch.library.custom_op` per call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awq.backends import backend_for
from awq.kernels import reference
from awq.kernels.checks import check_bias, check_input, check_weight, weight_of
from awq.kernels.packed import Packed
from awq.kernels.watched import watched

_WEIGHT = "Tensor qweight, Tensor qzeros, Tensor scales"
_SHAPE = "int in_features, int out_features, int group_size, str format"
LIBRARY = torch.library.Library("awq", "DEF")
LIBRARY.define(
    f"linear(Tensor x, {_WEIGHT}, Tensor? bias, {_SHAPE}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    f"linear_input_grad(Tensor grad, {_WEIGHT}, {_SHAPE}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _linear(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    format: str,
) -> Tensor:
    wanted = weight_of(in_features, out_features, group_size, format)
    shape = wanted.shape
    check_input(x, in_features, qweight)
    check_weight(qweight, qzeros, scales, wanted)
    if bias is not None:
        check_bias(bias, (out_features,), qweight.device)

    backend = backend_for(x.device, x.dtype, shape, format)
    return backend.linear(x, Packed(qweight, qzeros, scales, shape, format), bias)


def _input_grad(
    grad: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    in_features: int,
    out_features: int,
    group_size: int,
    format: str,
) -> Tensor:
    """grad [..., out] times the dense weight [out, in]."""
    wanted = weight_of(in_features, out_features, group_size, format)
    shape = wanted.shape
    check_input(grad, out_features, qweight, "the gradient")
    check_weight(qweight, qzeros, scales, wanted)
    backend = backend_for(grad.device, grad.dtype, shape, format)
    dequantize = getattr(backend, "dequantize", reference.dequantize)

    return reference.product(
        grad, dequantize(Packed(qweight, qzeros, scales, shape, format), grad.dtype).t(), None
    )


LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
LIBRARY.impl("linear_input_grad", _input_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("awq::linear")
def _(x, qweight, qzeros, scales, bias, in_features, out_features, group_size, format):
    check_input(x, in_features, qweight)
    if bias is not None:
        check_bias(bias, (out_features,), qweight.device)
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("awq::linear_input_grad")
def _(grad, qweight, qzeros, scales, in_features, out_features, group_size, format):
    return grad.new_empty(*grad.shape[:-1], in_features)


def _setup_context(ctx, inputs, output) -> None:
    x, qweight, qzeros, scales, bias, *shape = inputs
    ctx.save_for_backward(qweight, qzeros, scales)
    ctx.shape, ctx.bias_dtype = shape, None if bias is None else bias.dtype


def _backward(ctx, grad: Tensor):
    """Gradient of x (for LoRA on top of frozen weights) and of the bias; the packed weight has
    none."""
    needs_x = ctx.needs_input_grad[0]
    needs_bias = ctx.bias_dtype is not None and ctx.needs_input_grad[4]
    if needs_bias:
        grad_bias = grad.reshape(-1, grad.shape[-1]).float().sum(0).to(ctx.bias_dtype)
    else:
        grad_bias = None

    if needs_x:
        grad_x = torch.ops.awq.linear_input_grad(grad, *ctx.saved_tensors, *ctx.shape)
    else:
        grad_x = None

    return grad_x, None, None, None, grad_bias, None, None, None, None


torch.library.register_autograd("awq::linear", _backward, setup_context=_setup_context)
_op = torch.ops.awq.linear.default


def quantized_linear(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    format: str,
) -> Tensor:
    """x [..., in] → [..., out] in x's dtype, through packed weights of `format` (or layout); any
    rank is kept.

    Raises ConfigError when widths, dtypes or devices do not fit.
    """
    call = _op if watched(x, bias) else _linear
    return call(x, qweight, qzeros, scales, bias, in_features, out_features, group_size, format)
