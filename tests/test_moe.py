"""`awq::moe_linear` on a CPU: expert after expert against dense arithmetic; errors, fake tensors,
gradients, compilation."""

import pytest
import torch
from kernel_weights import pack, random_weight

from awq.errors import ConfigError
from awq.kernels import Packed, Shape, layout_for, moe_linear, reference, stack_experts
from awq.kernels.moe import one_by_one, without_asking
from awq.nn.capture import NoWaiting

SHAPE = Shape(128, 48, 32)


def experts_of(count, layout="gemm", shape=SHAPE):
    weights = [
        random_weight(shape.in_features, shape.out_features, shape.group_size, seed)
        for seed in range(count)
    ]
    dense = torch.stack([weight.dequantize(torch.float64) for weight in weights])
    return [pack(weight, layout) for weight in weights], dense


def inputs(tokens, top, count, shared=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens + top)
    x = torch.randn(
        *((tokens,) if shared else (tokens, top)), SHAPE.in_features, generator=generator
    ).to(dtype)
    chosen = torch.stack([torch.randperm(count, generator=generator)[:top] for _ in range(tokens)])
    return x, chosen, torch.rand(tokens, top, generator=generator)


def dense_product(x, dense, chosen, weights=None, bias=None):
    rows = x.double() if x.dim() == 3 else x.double().unsqueeze(1).expand(-1, chosen.shape[1], -1)
    y = torch.einsum("tki,tkoi->tko", rows, dense[chosen])
    y = y if bias is None else y + bias[chosen].double()
    return y if weights is None else (y * weights.double().unsqueeze(-1)).sum(1)


def error(y, expected):
    return ((y.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("layout", ["gemm", "gemv", "gemv_fast", "planar", None])
@pytest.mark.parametrize("shared", [True, False])
def test_equals_dense(layout, shared):
    layout = layout or layout_for(torch.device("cpu"), torch.float32, SHAPE) or "gemm"
    parts, dense = experts_of(5, layout)
    packed = stack_experts(parts)
    x, chosen, weights = inputs(9, 3, 5, shared)
    bias = torch.randn(5, SHAPE.out_features)
    assert error(moe_linear(x, packed, chosen), dense_product(x, dense, chosen)) < 1e-5
    assert (
        error(
            moe_linear(x, packed, chosen, weights, bias),
            dense_product(x, dense, chosen, weights, bias),
        )
        < 1e-5
    )
    assert (
        error(
            moe_linear(x, packed, chosen.int(), weights.half()),
            dense_product(x, dense, chosen, weights),
        )
        < 1e-3
    )


@pytest.mark.parametrize("dtype, limit", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision(dtype, limit):
    parts, dense = experts_of(4)
    x, chosen, weights = inputs(7, 2, 4, dtype=dtype)
    y = moe_linear(x, stack_experts(parts), chosen, weights)
    assert y.dtype == dtype and error(y, dense_product(x, dense, chosen, weights)) < limit


@pytest.mark.parametrize("tokens", [0, 1, 2, 9])  # fewer rows than experts, and more
@pytest.mark.parametrize("shared", [True, False])
def test_a_step_tells_the_host_no_numbers(tokens, shared):
    """What a GPU without kernels of its own for this dtype runs: any captured step."""
    parts, _ = experts_of(5)
    packed = stack_experts(parts)
    x, chosen, weights = inputs(max(tokens, 1), 2, 5, shared)
    x, chosen, weights = x[:tokens], chosen[:tokens], weights[:tokens]
    bias = torch.randn(5, SHAPE.out_features)
    for arguments in ((None, chosen, None), (bias, chosen.int(), weights)):
        expected = one_by_one(x, packed, *arguments, reference.linear)
        with torch.inference_mode(), NoWaiting("cpu"):
            found = without_asking(x, packed, *arguments, reference.linear)
        assert found.dtype == expected.dtype and found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [2, 9])
def test_experts_that_there_are_not_give_nan_where_nobody_asks(tokens):
    parts, _ = experts_of(5)
    packed = stack_experts(parts)
    x, chosen, _ = inputs(tokens, 2, 5)
    known = without_asking(x, packed, None, chosen, None, reference.linear)
    for number in (-1, 5, -(1 << 40), 1 << 40):
        changed = chosen.clone()
        changed[-1, -1] = number
        found = without_asking(x, packed, None, changed, None, reference.linear)
        assert found[-1, -1].isnan().all()
        assert torch.equal(found.flatten(0, 1)[:-1], known.flatten(0, 1)[:-1])


def test_no_tokens_and_one_expert():
    parts, dense = experts_of(1)
    packed = stack_experts(parts)
    x, chosen, weights = inputs(3, 1, 1)
    assert error(moe_linear(x, packed, chosen), dense_product(x, dense, chosen)) < 1e-5
    assert moe_linear(x[:0], packed, chosen[:0]).shape == (0, 1, 48)
    assert moe_linear(x[:0], packed, chosen[:0], weights[:0]).shape == (0, 48)


def test_what_does_not_fit_is_refused():
    parts, _ = experts_of(2)
    packed = stack_experts(parts)
    x, chosen, weights = inputs(3, 2, 2)
    for bad in (
        (x[:2], chosen),
        (x[:, :64], chosen),
        (x, chosen[0]),
        (x.view(3, 1, 128), chosen),
        (x, chosen, weights[:, :1]),
    ):
        with pytest.raises(ConfigError):
            moe_linear(bad[0], packed, *bad[1:])
    with pytest.raises(ConfigError):
        stack_experts([])
    with pytest.raises(ConfigError):
        stack_experts([parts[0], experts_of(1, "gemv")[0][0]])


def test_operator_is_registered_properly():
    packed = stack_experts(experts_of(3)[0])
    x, chosen, weights = inputs(4, 2, 3)
    for w in (None, weights):
        arguments = (x.requires_grad_(), *packed[:3], None, chosen, w, *packed.shape, packed.layout)
        torch.library.opcheck(torch.ops.awq.moe_linear.default, arguments)
    meta = moe_linear(
        x.to("meta"), Packed(*(t.to("meta") for t in packed[:3]), *packed[3:]), chosen.to("meta")
    )
    assert meta.shape == (4, 2, 48) and meta.device.type == "meta"


@pytest.mark.parametrize("shared", [True, False])
def test_gradients(shared):
    parts, dense = experts_of(4)
    packed = stack_experts(parts)
    x, chosen, weights = inputs(6, 2, 4, shared)
    x.requires_grad_(), weights.requires_grad_()
    gradient = torch.randn(6, SHAPE.out_features)
    moe_linear(x, packed, chosen, weights).backward(gradient)
    x64, w64 = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    dense_product(x64, dense, chosen, w64).backward(gradient.double())
    assert error(x.grad, x64.grad) < 1e-5 and error(weights.grad, w64.grad) < 1e-5
    x.grad = None
    moe_linear(x, packed, chosen).sum().backward()
    x64.grad = None
    dense_product(x64, dense, chosen).sum().backward()
    assert error(x.grad, x64.grad) < 1e-5
