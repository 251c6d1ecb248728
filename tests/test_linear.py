"""`WQLinear` equals the dense product, keeps ranks and its scales' dtype, compiles and
differentiates."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from awq.core.weight import round_to_nearest
from awq.errors import ConfigError
from awq.kernels import reference
from awq.modules.linear import WQLinear_GEMM, WQLinear_GEMV, WQLinear_GEMVFast
from awq.nn.linear import WQLinear


def make(format="gemm", bias=True, group_size=32):
    generator = torch.Generator().manual_seed(0)
    weight = round_to_nearest(torch.randn(24, 64, generator=generator), group_size)
    offset = torch.randn(24, generator=generator) if bias else None
    return WQLinear.from_quantized(weight, offset, format), weight, offset


@pytest.mark.parametrize("format", ["gemm", "gemv", "gemv_fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)])
def test_equals_dense(format, dtype, shape):
    module, weight, bias = make(format)
    module = module.to(dtype)
    x = torch.randn(shape, dtype=dtype)
    out = module(x)
    assert (
        out.dtype == dtype
        and out.shape == (*shape[:-1], 24)
        and module.scales.dtype == torch.float16
    )
    expected = F.linear(x.float(), weight.dequantize(), bias)
    assert (out.float() - expected).norm() / expected.norm() < {torch.float32: 1e-6}.get(
        dtype, 1e-2
    )


def test_gradient_reaches_the_input():
    module, weight, _ = make()
    x, grad = torch.randn(4, 64, requires_grad=True), torch.randn(4, 24)
    module(x).backward(grad)
    y = x.detach().clone().requires_grad_()
    F.linear(y, weight.dequantize(), module.bias).backward(grad)
    torch.testing.assert_close(x.grad, y.grad)


class Seen(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_a_call_that_is_watched_goes_through_the_operator():
    """Modes, transforms and tensors without data see the operator; otherwise its function is
    called at once, and gives the same bits."""
    module, _, _ = make()
    x = torch.randn(3, 64)
    module(x)  # moves the weight to the layout that its backend computes on
    with Seen() as seen:
        expected = module(x)
    assert seen.names == ["awq::linear"]
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert torch.equal(module(x), expected)
    assert torch.equal(torch.func.vmap(module)(x), expected)
    assert module.to("meta")(x.to("meta")).is_meta


def test_compiles_without_a_graph_break():
    module, _, _ = make()
    x = torch.randn(3, 64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("format", ["gemm", "gemv", "gemv_fast"])
@pytest.mark.parametrize("bias", [True, False])
def test_operator_passes_opcheck(format, bias):
    m, _, _ = make(format, bias)
    arguments = (
        torch.randn(3, 64, requires_grad=True),
        m.qweight,
        m.qzeros,
        m.scales,
        m.bias,
        64,
        24,
        32,
        format,
    )
    torch.library.opcheck(torch.ops.awq.linear.default, arguments)


@pytest.mark.parametrize("format", ["gemm", "gemv", "gemv_fast"])
@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_dense_weight_equals_the_canonical_one_bit_for_bit(format, group_size):
    m, weight, _ = make(format, group_size=group_size)
    dense = reference.dequantize(m.packed)
    assert torch.equal(dense, weight.dequantize()) and torch.equal(m.dequantize(), dense)


@pytest.mark.parametrize("format", ["gemm", "gemv", "gemv_fast"])
def test_state_dict_goes_through_a_module_born_on_meta(format):
    module, weight, bias = make(format)
    born = WQLinear(64, 24, True, 32, format, device="meta")
    assert all(t.is_meta for t in born.state_dict().values())
    born.load_state_dict(module.state_dict(), assign=True)
    assert all(torch.equal(a, b) for a, b in zip(born.quantized()[:3], weight[:3])) and torch.equal(
        born.bias, bias
    )
    born = WQLinear(64, 24, True, 32, format, device="meta").to_empty(device="cpu")
    born.load_state_dict(module.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(born(x), module(x))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
@pytest.mark.parametrize("format", ["gemm", "gemv_fast"])
def test_casts_reach_the_bias_only(format, cast):
    module, weight, _ = make(format)
    module = getattr(torch.nn.Sequential(module), cast)()[0]
    assert module.bias.dtype == getattr(torch, cast) and module.scales.dtype == torch.float16
    assert all(torch.equal(a, b) for a, b in zip(module.quantized()[:3], weight[:3]))


@pytest.mark.parametrize(
    "shape, format", [((64, 12, 32), "gemm"), ((64, 16, 24), "gemm"), ((96, 8, 32), "gemv_fast")]
)
def test_a_shape_that_does_not_fit_is_refused(shape, format):
    with pytest.raises(ConfigError, match="multiple of"):
        WQLinear(shape[0], shape[1], False, shape[2], format)


@pytest.mark.parametrize("cls", [WQLinear_GEMM, WQLinear_GEMV, WQLinear_GEMVFast])
def test_autoawq_constructor_and_from_linear(cls):
    linear = torch.nn.Linear(64, 24)
    weight = round_to_nearest(linear.weight.data, 32)
    packed = cls.from_linear(linear, 4, 32, False, weight.scales, weight.zeros)
    torch.testing.assert_close(packed.dequantize(), weight.dequantize())
    empty = cls(4, 32, 64, 24, True, "cpu")
    empty.load_state_dict(packed.state_dict())
    torch.testing.assert_close(empty(torch.ones(64)), packed(torch.ones(64)), rtol=1e-3, atol=1e-3)
