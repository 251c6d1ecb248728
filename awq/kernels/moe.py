"""`awq::moe_linear`: the products of a mixture of experts as one operator, differentiable in x and
in the experts' weights.

The packed tensors of all experts are stacked along a leading axis: any layout of `awq.formats` with
`[experts, …]` in front. A backend may bring its own `moe_linear(x, packed, bias, experts,
weights)`. The others serve expert after expert, which asks the device how the tokens are spread;
for the few tokens of a decoding step, and while a CUDA graph is captured, a GPU is not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from awq.backends import backend_for
from awq.errors import ConfigError
from awq.kernels import reference
from awq.kernels.checks import (
    check_bias,
    check_expert_range,
    check_experts,
    check_input,
    check_weight,
    weight_of,
)
from awq.kernels.op import LIBRARY
from awq.kernels.packed import Packed

_WEIGHT = "Tensor qweight, Tensor qzeros, Tensor scales"
_SHAPE = "int in_features, int out_features, int group_size, str format"
Linear = Callable[[Tensor, Packed, Tensor | None], Tensor]  # (x, packed, bias) → y, a backend's

LIBRARY.define(
    f"moe_linear(Tensor x, {_WEIGHT}, Tensor? bias, Tensor experts, Tensor? weights, {_SHAPE}) -> "
    "Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    f"moe_linear_input_grad(Tensor grad, {_WEIGHT}, Tensor experts, {_SHAPE}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def stack_experts(experts: Sequence[Packed]) -> Packed:
    """The packed weights of all experts with a leading expert axis; `shape` stays that of one
    expert.

    Raises ConfigError when shapes or layouts differ.
    """
    if len({(e.shape, e.layout) for e in experts}) != 1:
        raise ConfigError(
            "experts can be stacked when there are some, and their shapes and layouts are the same."
        )

    qweight, qzeros, scales = (torch.stack(tensors) for tensors in zip(*(e[:3] for e in experts)))
    return Packed(qweight, qzeros, scales, experts[0].shape, experts[0].layout)


def expert_of(packed: Packed, number: int) -> Packed:
    """One expert's weight out of a stack, without a copy."""
    return Packed(
        packed.qweight[number],
        packed.qzeros[number],
        packed.scales[number],
        packed.shape,
        packed.layout,
    )


def moe_linear(
    x: Tensor,
    packed: Packed,
    experts: Tensor,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Every token through its experts' linears, in x's dtype.

    x: [tokens, in], or [tokens, top_k, in] when each expert of a token reads its own row (a second
    projection).
    packed: a stack of experts (`stack_experts`) in the layout of the backend that is to serve, or
    any other.
    experts: int64 or int32 [tokens, top_k], values 0 … experts − 1. A GPU that need not stop for
    them gives NaN for others.
    weights: float [tokens, top_k]; with them a token's outputs are weighted in float32 and added
    up.
    bias: [experts, out].

    Returns [tokens, top_k, out], or [tokens, out] with weights. Raises ConfigError when sizes do
    not fit together.
    """
    if (
        experts.dim() != 2
        or (x.shape[:-1] != experts.shape[: x.dim() - 1])
        or x.dim() not in (2, 3)
    ):
        raise ConfigError(
            f"x of {list(x.shape)} does not fit experts of {list(experts.shape)}: they are "
            "[tokens, in] or [tokens, top_k, in], "
            "and [tokens, top_k]."
        )
    if x.shape[-1] != packed.shape.in_features:
        raise ConfigError(
            f"x has {x.shape[-1]} inputs, and the experts take {packed.shape.in_features}."
        )
    if weights is not None and weights.shape != experts.shape:
        raise ConfigError(
            f"weights of {list(weights.shape)} do not fit experts of {list(experts.shape)}: both "
            "are [tokens, top_k]."
        )
    return _op(
        x,
        packed.qweight,
        packed.qzeros,
        packed.scales,
        bias,
        experts,
        weights,
        *packed.shape,
        packed.layout,
    )


def one_by_one(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor | None,
    linear: Linear,
) -> Tensor:
    """`moe_linear` expert after expert through a backend's `linear`: what every other
    implementation must equal."""
    top = experts.shape[1]
    y = x.new_empty((experts.numel(), packed.shape.out_features))
    source = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    for number, rows in _rows_by_expert(experts, len(packed.qweight)):
        inputs = source[rows // top if x.dim() == 2 else rows]
        y[rows] = linear(inputs, *_with_bias(packed, bias, number))

    return _weighted(y, experts, weights)


def without_asking(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor | None,
    linear: Linear,
) -> Tensor:
    """`one_by_one` in kernels whose number and sizes do not depend on the numbers of the experts,
    which the host never learns; NaN for experts that there are not.

    The weights of a row's expert are picked on the device. Where there are more rows than experts,
    each expert computes all of them instead.
    """
    count = len(packed.qweight)
    numbers = experts.reshape(-1)
    inputs = x.repeat_interleave(experts.shape[1], 0) if x.dim() == 2 else x.flatten(0, 1)
    y = x.new_full((len(numbers), packed.shape.out_features), torch.nan)

    if len(numbers) <= count:
        known = numbers.clamp(0, count - 1)
        for row in range(len(numbers)):
            one = slice(row, row + 1)
            y[one] = linear(inputs[one], *_picked(packed, bias, known[one]))
        unknown = (numbers != known).unsqueeze(1)
        return _weighted(y.masked_fill_(unknown, torch.nan), experts, weights)

    for expert in range(count):
        of_all = linear(inputs, *_with_bias(packed, bias, expert))
        y = torch.where((numbers == expert).unsqueeze(1), of_all, y)
    return _weighted(y, experts, weights)


def _with_bias(packed: Packed, bias: Tensor | None, number: int) -> tuple[Packed, Tensor | None]:
    """One expert's weight and bias, without a copy."""
    return expert_of(packed, number), None if bias is None else bias[number]


def _picked(packed: Packed, bias: Tensor | None, number: Tensor) -> tuple[Packed, Tensor | None]:
    """`_with_bias` for a number [1] that stays on its device; a copy."""
    qweight, qzeros, scales = (part.index_select(0, number).squeeze(0) for part in packed[:3])
    own_bias = None if bias is None else bias.index_select(0, number).squeeze(0)
    return Packed(qweight, qzeros, scales, packed.shape, packed.layout), own_bias


def _weighted(y: Tensor, experts: Tensor, weights: Tensor | None) -> Tensor:
    """y [tokens · top_k, out] as [tokens, top_k, out], or with weights [tokens, out]."""
    each = y.view(*experts.shape, y.shape[-1])
    if weights is None:
        return each
    return (each.float() * weights.float().unsqueeze(-1)).sum(1).to(y.dtype)


def _rows_by_expert(experts: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """(expert, its rows out of tokens · top_k) for every expert that has any, out of `count`.

    Raises ConfigError for other numbers: what is asked of the device anyway is looked at.
    """
    flat = experts.reshape(-1)
    numbers = flat.unique().tolist()
    check_expert_range(numbers, count)
    for number in numbers:
        yield number, (flat == number).nonzero().squeeze(-1)


def _moe_linear(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    format: str,
) -> Tensor:
    wanted = weight_of(in_features, out_features, group_size, format)
    shape = wanted.shape
    check_input(x, in_features, qweight)
    check_experts(experts, weights, len(qweight), qweight.device)
    check_weight(qweight, qzeros, scales, wanted, len(qweight))
    if bias is not None:
        check_bias(bias, (len(qweight), out_features), qweight.device)
    if x.shape[:-1] != experts.shape[: x.dim() - 1] or x.dim() not in (2, 3):
        raise ConfigError(f"x of {list(x.shape)} does not fit experts of {list(experts.shape)}.")

    backend = backend_for(x.device, x.dtype, shape, format)
    packed = Packed(qweight, qzeros, scales, shape, format)
    own = getattr(backend, "moe_linear", None)
    y = None if own is None else own(x, packed, bias, experts, weights)

    if y is None:
        serve = without_asking if _no_asking(experts, len(qweight)) else one_by_one
        return serve(x, packed, bias, experts, weights, backend.linear)
    return y


def _no_asking(experts: Tensor, count: int) -> bool:
    """Whether a GPU computes these without telling the host their numbers."""
    if not experts.is_cuda:
        return False
    return experts.numel() <= count or torch.cuda.is_current_stream_capturing()


def _input_grad(
    grad: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    experts: Tensor,
    in_features: int,
    out_features: int,
    group_size: int,
    format: str,
) -> Tensor:
    """grad [tokens, top_k, out] times each row's dense weight [out, in]: [tokens, top_k, in]."""
    wanted = weight_of(in_features, out_features, group_size, format)
    shape = wanted.shape
    check_input(grad, out_features, qweight, "the gradient")
    check_experts(experts, None, len(qweight), qweight.device)
    check_weight(qweight, qzeros, scales, wanted, len(qweight))
    backend = backend_for(grad.device, grad.dtype, shape, format)
    dequantize = getattr(backend, "dequantize", reference.dequantize)
    packed = Packed(qweight, qzeros, scales, shape, format)
    rows_of_grad = grad.reshape(-1, out_features)
    result = grad.new_empty((rows_of_grad.shape[0], in_features))

    for number, rows in _rows_by_expert(experts, len(qweight)):
        dense = dequantize(expert_of(packed, number), grad.dtype)
        result[rows] = reference.product(rows_of_grad[rows], dense.t(), None)

    return result.view(*experts.shape, in_features)


LIBRARY.impl("moe_linear", _moe_linear, "CompositeExplicitAutograd")
LIBRARY.impl("moe_linear_input_grad", _input_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("awq::moe_linear")
def _(
    x,
    qweight,
    qzeros,
    scales,
    bias,
    experts,
    weights,
    in_features,
    out_features,
    group_size,
    format,
):
    check_input(x, in_features, qweight)
    check_experts(experts, weights, None, qweight.device)
    return x.new_empty(*experts.shape[: 2 if weights is None else 1], out_features)


@torch.library.register_fake("awq::moe_linear_input_grad")
def _(grad, qweight, qzeros, scales, experts, in_features, out_features, group_size, format):
    return grad.new_empty(*experts.shape, in_features)


def _setup_context(ctx, inputs, output) -> None:
    x, qweight, qzeros, scales, bias, experts, weights, *shape = inputs
    ctx.save_for_backward(
        x if weights is not None else None, qweight, qzeros, scales, bias, experts, weights
    )
    ctx.shape, ctx.shared_rows = shape, x.dim() == 2


def _backward(ctx, grad: Tensor):
    """Gradients of x and of the experts' weights; the packed weights and the biases have none."""
    x, qweight, qzeros, scales, bias, experts, weights = ctx.saved_tensors
    grad_x = grad_weights = None
    if weights is not None:
        if ctx.needs_input_grad[6]:
            y = torch.ops.awq.moe_linear(
                x, qweight, qzeros, scales, bias, experts, None, *ctx.shape
            )
            grad_weights = (y.float() * grad.float().unsqueeze(1)).sum(-1).to(weights.dtype)
        grad = (grad.float().unsqueeze(1) * weights.float().unsqueeze(-1)).to(grad.dtype)

    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.awq.moe_linear_input_grad(
            grad, qweight, qzeros, scales, experts, *ctx.shape
        )
        grad_x = grad_x.sum(1) if ctx.shared_rows else grad_x

    return grad_x, None, None, None, None, None, grad_weights, None, None, None, None


torch.library.register_autograd("awq::moe_linear", _backward, setup_context=_setup_context)
_op = torch.ops.awq.moe_linear.default
