"""Who computes, and what no backend is given: one table for all operators, and checks before any
address is handed out."""

import pytest
import torch
import zoo
from test_layout import random_weight

from awq._triton import triton_problem
from awq.backends import operator, use_backend
from awq.errors import ConfigError
from awq.generate import build_decoder
from awq.generate.run import operations as ops
from awq.generate.run.cache import LayerCache
from awq.kernels import Packed, Shape, cpu, moe_linear, stack_experts
from awq.kernels.cpu.engine import Program
from awq.kernels.specs import Attention, Norm
from awq.nn.linear import WQLinear

CPU = torch.device("cpu")
BACKENDS = ["reference", "cpu", "torch_int4", None]


def decode(decoder):
    ids = torch.tensor([[5, 9, 7, 11]])
    first = decoder.prefill(ids, [4])
    return torch.stack(
        [first, decoder.step(first.argmax(-1), torch.tensor([4], dtype=torch.int32), 4)]
    )


def test_the_reference_turns_off_every_generated_kernel(monkeypatch):
    """Products, norms, activations, attention and head of a decode step: what is forced computes,
    and nothing else."""
    decoder = build_decoder(zoo.tiny_model("llama"), 32)
    expected = decode(decoder)

    def ran(program, task):
        raise AssertionError("a generated kernel ran")

    monkeypatch.setattr(Program, "__call__", ran)
    with pytest.raises(AssertionError, match="generated kernel ran"):
        decode(decoder)
    with use_backend("reference"):
        torch.testing.assert_close(decode(decoder), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["add_norm", "activate", "gated", "split", "attend", "dense", "gate_interleave"]
)
@pytest.mark.parametrize("forced", ["reference", "cpu", "torch_int4", "cpu_int8"])
def test_what_a_forced_backend_lacks_is_the_references(name, forced):
    with use_backend(forced):
        found = operator(name, CPU, torch.bfloat16)
    own = forced.startswith("cpu") and name in cpu.OPERATORS
    assert found.__module__ == (
        "awq.kernels.cpu.decode_launch" if own else "awq.kernels.reference.decode"
    )


@pytest.mark.parametrize("name", ["best_range", "scaled_losses", "round_block", "descend_block"])
def test_searches_have_no_kernels_without_a_gpu(name):
    assert operator(name, CPU, torch.float32) is None


WRONG_INPUTS = [
    torch.zeros(3, 64),
    torch.zeros(3, 256),
    torch.zeros(128, 1),
    torch.tensor(1.0),
    torch.zeros(2, 0),
    torch.zeros(3, 128, dtype=torch.int64),
    torch.zeros(3, 128, dtype=torch.complex64),
    torch.zeros(3, 128, device="meta"),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_that_do_not_fit_are_refused(backend):
    linear = WQLinear.from_quantized(random_weight(128, 24, 32), torch.zeros(24)).bfloat16()
    with use_backend(backend):
        assert linear(torch.zeros(2, 3, 128, dtype=torch.bfloat16)).shape == (2, 3, 24)
        for x in WRONG_INPUTS:
            with pytest.raises(ConfigError):
                linear(x.bfloat16() if x.is_floating_point() else x)


@pytest.mark.parametrize("layout", ["gemm", "planar", "rows16"])
def test_packed_tensors_that_do_not_fit_are_refused(layout):
    linear = WQLinear.from_quantized(random_weight(128, 32, 32), layout=layout)
    t, x = linear._buffers, torch.zeros(3, 128)
    right = [t["qweight"], t["qzeros"], t["scales"], None, 128, 32, 32, layout]
    torch.ops.awq.linear(x, *right)
    changes = [
        (0, right[0][:-1]),
        (0, right[0].float()),
        (0, right[0].to("meta")),
        (2, right[2][..., :-1]),
        (2, right[2].double()),
        (3, torch.zeros(31)),
        (3, torch.zeros(32, dtype=torch.int32)),
        (3, torch.zeros(32, device="meta")),
        (0, right[0].flip(0).transpose(0, -1)),
        (5, 128),
        (4, 64),
        (6, 64),
    ]
    for place, value in changes:
        arguments = [value if i == place else r for i, r in enumerate(right)]
        with pytest.raises((ConfigError, ValueError)):
            torch.ops.awq.linear(x, *arguments)


def test_gradients_of_another_width_are_refused():
    t = WQLinear.from_quantized(random_weight(128, 32, 32))._buffers
    with pytest.raises(ConfigError, match="gradient"):
        torch.ops.awq.linear_input_grad(
            torch.zeros(3, 31), t["qweight"], t["qzeros"], t["scales"], 128, 32, 32, "gemm"
        )


def test_experts_that_do_not_exist_are_refused():
    parts = [WQLinear.from_quantized(random_weight(128, 16, 32, seed=s)).packed for s in range(3)]
    packed, x = stack_experts(parts), torch.zeros(4, 128)
    chosen = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2]])
    assert moe_linear(x, packed, chosen).shape == (4, 2, 16)
    wrong = [chosen + 1, chosen - 1, chosen.float(), chosen.bool(), chosen.to("meta")]
    for experts in wrong:
        with pytest.raises(ConfigError):
            moe_linear(x, packed, experts)
    with pytest.raises(ConfigError):
        moe_linear(x, packed, chosen, torch.ones(4, 2, dtype=torch.int64))
    with pytest.raises(ConfigError):
        moe_linear(x, packed, chosen, bias=torch.zeros(2, 16))
    with pytest.raises(ConfigError):
        moe_linear(x, Packed(packed.qweight[:2], *packed[1:3], Shape(128, 16, 32), "gemm"), chosen)


def test_decode_operators_refuse_what_does_not_fit():
    x, norm = torch.randn(2, 1, 32), Norm(torch.ones(32), None, 1e-6, False)
    branches = (
        torch.zeros(2, 1, 31),
        torch.zeros(1, 1, 32),
        torch.zeros(2, 1, 32).half(),
        torch.zeros(2, 1, 32, device="meta"),
    )
    for branch in branches:
        with pytest.raises(ConfigError, match="branch"):
            ops.add_norm(x, branch, 1.0, norm)
    for weight in (torch.ones(31), torch.ones(32).half(), torch.ones(64)[::2]):
        with pytest.raises(ConfigError, match="norm"):
            ops.add_norm(x, None, 1.0, Norm(weight, None, 1e-6, False))
    with pytest.raises(ConfigError, match="odd"):
        ops.activate(torch.zeros(2, 7), torch.relu, "relu", True)
    a = Attention(4, 2, 8, 1.0, None, None, 8)
    angles = torch.zeros(16, 4)
    right = dict(
        qkv=torch.zeros(2, 1, 64),
        cos=angles,
        sin=angles,
        k=torch.zeros(2, 2, 16, 8),
        lengths=[3, 4],
        longest=4,
    )
    wrong = [
        dict(qkv=torch.zeros(2, 1, 63)),
        dict(qkv=torch.zeros(3, 1, 64)),
        dict(k=torch.zeros(2, 2, 16, 7)),
        dict(longest=16),
        dict(k=torch.zeros(2, 2, 16, 8).half()),
        dict(k=torch.zeros(2, 2, 8, 16).transpose(2, 3)),
        dict(lengths=[3]),
        dict(cos=torch.zeros(16, 3)),
        dict(sin=torch.zeros(4, 4)),
        dict(cos=angles.double()),
    ]

    def step(qkv, cos, sin, k, lengths, longest):
        return ops.attend_step(
            qkv,
            a,
            cos,
            sin,
            LayerCache(k, k.clone()),
            torch.tensor(lengths, dtype=torch.int32),
            longest,
        )

    assert step(**right).shape == (2, 1, 32)
    for change in wrong:
        with pytest.raises(ConfigError):
            step(**(right | change))


def test_a_triton_that_is_too_old_is_told_and_not_imported(monkeypatch):
    """torch 2.6 and 2.7 bring one without what the kernels import; the reference serves there."""
    triton = pytest.importorskip("triton", reason="needs Linux, for Triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    found = triton_problem.__wrapped__(torch.device("cuda:0"))
    assert found == "Triton 3.3.1 is older than 3.4; install torch 2.8 or later"
