"""In-memory layouts: exact both ways, invisible in checkpoints, followed by every backend."""

import copy
import types

import pytest
import torch
from kernel_weights import random_weight

from awq import backends
from awq.errors import ConfigError
from awq.formats import get_format, get_layout
from awq.kernels import Packed, Shape, choose, explain, reference, use_backend
from awq.nn.layout import concatenate_outputs, prepare, restore, split_outputs
from awq.nn.linear import WQLinear

SHAPES = [
    (128, 64, 128),
    (256, 8, 32),
    (64, 72, 64),
    (96, 24, 32),
    (136, 16, 136),
    (4224, 8, 128),
    (24, 8, 8),
    (192, 40, 96),
]


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a
    )


@pytest.fixture
def planar(monkeypatch):
    """A backend that computes on the planar layout wherever it is asked to, with the reference's
    arithmetic."""
    served = []

    def linear(x, packed, bias):
        served.append(packed.layout)
        return reference.linear(x, packed, bias)

    module = types.SimpleNamespace(
        LAYOUT="planar",
        linear=linear,
        served=served,
        why_not=lambda device, dtype, shape: (
            "float64 is not served" if dtype == torch.float64 else None
        ),
    )
    monkeypatch.setattr(backends, "PREFERENCE", ("planar_test", *backends.PREFERENCE))
    monkeypatch.setattr(
        backends,
        "get_backend",
        lambda n, old=backends.get_backend: module if n == "planar_test" else old(n),
    )
    backends.forget()
    yield module
    backends.forget()


@pytest.mark.parametrize("shape", SHAPES)
def test_planar_is_exact_both_ways(shape):
    weight, codec = random_weight(*shape), get_layout("planar")
    tensors = codec.pack(weight)
    assert {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()} == codec.shapes(*shape)
    assert all(t.is_contiguous() for t in tensors.values())
    assert all(torch.equal(a, b) for a, b in zip(codec.unpack(tensors, *shape)[:3], weight[:3]))


def test_planar_nibbles_are_where_the_kernels_look():
    weight = random_weight(256, 64, 128)
    words = get_layout("planar").pack(weight)["qweight"].int() & 0xFFFF
    for t, n, i, j in [(0, 0, 0, 0), (1, 63, 31, 3), (0, 5, 17, 2), (1, 40, 2, 1)]:
        assert (words[t, n, i] >> (4 * j)) & 15 == weight.codes[n, 128 * t + 32 * j + i]


def test_no_checkpoint_names_an_in_memory_layout():
    with pytest.raises(ConfigError):
        get_format("planar")
    with pytest.raises(ConfigError):
        WQLinear(128, 64, format="planar")


@pytest.mark.parametrize(
    "format, shape",
    [("gemm", (256, 24, 32)), ("gemv", (192, 24, 64)), ("gemv_fast", (256, 24, 32))],
)
def test_forward_moves_the_weight_and_the_state_dict_does_not_change(planar, format, shape):
    module = WQLinear.from_quantized(random_weight(*shape), torch.randn(24), format)
    before, x = {k: t.clone() for k, t in module.state_dict().items()}, torch.randn(3, shape[0])
    expected = reference.linear(x, module.packed, module.bias)
    assert (
        torch.equal(module(x), expected)
        and module.layout == "planar"
        and planar.served == ["planar"]
    )
    # no second copy
    assert module.qweight.dtype == torch.int16 and len(list(module.buffers())) == 4
    assert same(module.state_dict(), before)
    again = WQLinear(shape[0], 24, True, shape[2], format)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), expected)
    # Loading into a module that has moved already, copying and assigning.
    other = WQLinear.from_quantized(random_weight(*shape, seed=1), torch.randn(24), format)
    for assign in (False, True):
        module.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(module(x), other(x)) and same(module.state_dict(), other.state_dict())
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    restore(module)
    assert module.layout == format and same(module.state_dict(), other.state_dict())


@pytest.mark.parametrize("format", ["gemv", "gemv_fast"])
def test_tensors_that_packing_would_change_are_saved_unchanged(planar, format):
    """Other writers leave rubbish in the padding, or round −s·z from a scale of more bits."""
    module = WQLinear.from_quantized(random_weight(192, 24, 64), None, format)
    padding = module.qzeros[:, -1:] if format == "gemv" else module.qzeros[-1:]
    padding.fill_(7)
    if format == "gemv_fast":
        module.qzeros[0].mul_(1 + 2**-10)
    before, x = {k: t.clone() for k, t in module.state_dict().items()}, torch.randn(2, 192)
    out = module(x)
    assert module.layout == "planar" and same(module.state_dict(), before)
    restore(module)
    assert torch.equal(module(x), out) and same(module.state_dict(), before)


def test_partial_load_keeps_the_weight(planar):
    module, x = (
        WQLinear.from_quantized(random_weight(128, 8, 32), torch.zeros(8)),
        torch.randn(2, 128),
    )
    out = module(x)
    module.load_state_dict({"bias": torch.ones(8)}, strict=False)
    torch.testing.assert_close(module(x), out + 1)
    scales = module.state_dict()["scales"]
    module.load_state_dict({"scales": scales * 2}, strict=False)
    torch.testing.assert_close(module(x), 2 * out + 1)


def test_a_tensor_put_back_by_an_offload_hook_is_recognized(planar):
    module, x = WQLinear.from_quantized(random_weight(128, 8, 32)), torch.randn(2, 128)
    stored = {k: t.clone() for k, t in module.state_dict().items()}
    out = module(x)
    module._buffers.update(stored)
    assert torch.equal(module(x), out)


def test_compilation_takes_the_layout_as_it_is(planar):
    module, x = WQLinear.from_quantized(random_weight(128, 8, 32)), torch.randn(2, 128)
    expected = reference.linear(x, module.packed, None)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    assert module.layout == "gemm" and planar.served == []
    assert prepare(module) == 1 and module.layout == "planar"
    torch.testing.assert_close(compiled(x), expected)
    assert planar.served == ["planar"]


def test_backward_of_a_moved_weight(planar):
    module, x = (
        WQLinear.from_quantized(random_weight(128, 8, 32)),
        torch.randn(3, 128, requires_grad=True),
    )
    module(x).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    (y @ module.dequantize().t()).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_backends_are_chosen_forced_and_explained(planar):
    shape, cpu = Shape(128, 8, 32), torch.device("cpu")
    assert (
        choose(cpu, torch.float32, shape) == "planar_test"
        and choose(cpu, torch.float32, shape, "gemm") == "reference"
    )
    assert choose(cpu, torch.float64, shape) == "reference"
    with use_backend("reference"):
        assert choose(cpu, torch.float32, shape) == "reference"
    with use_backend("planar_test"), pytest.raises(ConfigError, match="float64 is not served"):
        choose(cpu, torch.float64, shape)
    with use_backend("planar_test"), pytest.raises(ConfigError, match="layout planar, not gemm"):
        choose(cpu, torch.float32, shape, "gemm")
    with use_backend("fast"), pytest.raises(ConfigError, match="unknown"):
        choose(cpu, torch.float32, shape)
    module = WQLinear.from_quantized(random_weight(*shape))
    found = explain(module, torch.float32)
    assert found.backend == "reference" and "first forward" in found.others["planar_test"]
    prepare(module, torch.float32)
    found = explain(module, torch.float32)
    assert (
        found.backend == "planar_test"
        and found.layout == "planar"
        and found.others["reference"] == "planar_test comes first"
    )
    assert "planar_test" in str(found) and "not reference" in str(found)
    assert explain(module, torch.float64).others["planar_test"] == "float64 is not served"


def test_siblings_are_joined_and_split_exactly():
    parts = [
        WQLinear.from_quantized(random_weight(128, n, 32, seed=n), bias)
        for n, bias in ((16, torch.randn(16)), (8, None))
    ]
    joined, x = concatenate_outputs(parts), torch.randn(3, 128)
    torch.testing.assert_close(joined(x), torch.cat([p(x) for p in parts], -1))
    for part, again in zip(parts, split_outputs(joined, [16, 8])):
        assert all(torch.equal(a, b) for a, b in zip(part.quantized()[:3], again.quantized()[:3]))
    with pytest.raises(ConfigError, match="groups of 64"):
        concatenate_outputs([parts[0], WQLinear.from_quantized(random_weight(128, 8, 64))])
    with pytest.raises(ConfigError, match="cannot be split"):
        split_outputs(joined, [16, 16])


def test_packed_weights_change_layout():
    weight = random_weight(256, 24, 64)
    tensors = get_format("gemm").pack(weight)
    packed = Packed(
        tensors["qweight"], tensors["qzeros"], tensors["scales"], Shape(256, 24, 64), "gemm"
    )
    moved = packed.to_layout("planar")
    assert moved.layout == "planar" and torch.equal(
        reference.dequantize(moved), reference.dequantize(packed)
    )
    assert same(dict(zip("abc", moved.to_layout("gemm")[:3])), dict(zip("abc", packed[:3])))
