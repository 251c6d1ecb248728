"""torch's own 4-bit product: what a CPU gets without llvmlite. It computes in bfloat16, so that is
what it is held to."""

import pytest
import torch
from test_cpu import CPU, error, pack, random_weight

from awq import backends
from awq.formats import get_layout
from awq.kernels import Shape, choose, torch_int4, use_backend
from awq.nn.linear import WQLinear

SHAPES = [(128, 64, 32), (256, 72, 64), (384, 17, 128), (512, 200, 256)]
pytestmark = pytest.mark.skipif(torch_int4.problem() is not None, reason=f"{torch_int4.problem()}")


@pytest.mark.parametrize("shape", [*SHAPES, (24, 8, 8), (136, 17, 136)])
def test_layout_is_exact_both_ways(shape):
    weight, codec = random_weight(*shape), get_layout("int4pack")
    tensors = codec.pack(weight)
    assert {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()} == codec.shapes(*shape)
    assert all(torch.equal(a, b) for a, b in zip(codec.unpack(tensors, *shape)[:3], weight[:3]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5, torch_int4.MANY + 3])
def test_equals_the_dense_product(shape, dtype, tokens):
    weight, packed = random_weight(*shape), pack(random_weight(*shape), "int4pack")
    x, bias = torch.randn(2, tokens, shape[0]).to(dtype), torch.randn(shape[1]).to(dtype)
    for b in (None, bias):
        out = torch_int4.linear(x, packed, b)
        assert out.dtype == dtype and out.shape == (2, tokens, shape[1])
        assert error(out, x, weight, b) < 6e-3


@pytest.mark.parametrize("format", ["gemm", "gemv", "gemv_fast"])
def test_saves_the_same_bytes(format):
    module = WQLinear.from_quantized(random_weight(128, 24, 64), torch.randn(24), format).half()
    before = {k: t.clone() for k, t in module.state_dict().items()}
    with use_backend("torch_int4"):
        module(torch.randn(3, 128, dtype=torch.float16))
    module.float().half()  # a cast must not reach scales in any layout
    after = module.state_dict()
    assert module.layout == "int4pack"
    assert all(torch.equal(after[k].view(torch.uint8), before[k].view(torch.uint8)) for k in before)


def test_reasons(monkeypatch):
    shape = Shape(128, 64, 32)
    assert "weights are on cuda" in torch_int4.why_not(torch.device("cuda"), torch.float16, shape)
    assert "float64" in torch_int4.why_not(CPU, torch.float64, shape)
    assert "it computes in bfloat16" in torch_int4.why_not(CPU, torch.float32, shape)
    assert "group_size is 96" in torch_int4.why_not(CPU, torch.bfloat16, Shape(192, 64, 96))
    with use_backend("torch_int4"):
        assert choose(CPU, torch.bfloat16, shape) == "torch_int4"
    assert backends.PREFERENCE.index("cpu") < backends.PREFERENCE.index("torch_int4")
    torch_int4.problem.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "AVX2" in torch_int4.why_not(CPU, torch.bfloat16, shape)
    torch_int4.problem.cache_clear()
    monkeypatch.undo()
    right = torch_int4.linear
    monkeypatch.setattr(torch_int4, "linear", lambda x, packed, bias: right(x, packed, bias) * 1.1)
    assert "trial product was wrong" in torch_int4.why_not(CPU, torch.bfloat16, shape)
    torch_int4.problem.cache_clear()
