"""Int4 products on a GPU, at the sizes of real models and at odd ones: against float64, the same
bits twice, in CUDA graphs, compiled, on two streams, backward.

The interpreter runs the same kernels on small shapes in `test_triton.py`. `pytest -n 12` spreads
these over processes, since each compiles its own kernels.
"""

import itertools
import math

import pytest
import torch
from kernel_weights import TOLERANCE, pack, product_error, random_weight

from awq.kernels import moe_linear, stack_experts
from awq.kernels.reference.decode import ACTIVATIONS
from awq.nn.layout import prepare
from awq.nn.linear import WQLinear

pytestmark = pytest.mark.gpu

# outputs, inputs, group
SHAPES = [
    (4096, 4096, 128),
    (6144, 4096, 128),
    (1024, 1536, 64),
    (72, 4224, 128),
    (136, 96, 32),
    (200, 576, 576),
    (8, 128, 128),
    (1000, 3072, 96),
    (4096, 136, 136),
    (512, 2048, 256),
]
# both sides of every bucket's end
TOKENS = (1, 2, 3, 5, 8, 9, 16, 17, 31, 33, 64, 65, 100, 129, 256, 300, 513, 1024, 2049, 4096)
HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_products_equal_float64(shape, dtype):
    from awq.kernels.triton import matmul_launch

    n, k, group = shape
    weight = random_weight(k, n, group, n + k, "cuda")
    packed, dense = pack(weight), weight.dequantize(torch.float64)
    for tokens in TOKENS:
        x = torch.randn(tokens, k, device="cuda").to(dtype)
        bias = torch.randn(n, device="cuda").to(dtype) if tokens % 2 else None
        # freed at once: poisons the memory that the product may get
        torch.full((max(tokens, 16), n), math.nan, device="cuda", dtype=dtype)
        y = matmul_launch.linear(x, packed, bias)
        assert torch.equal(y, matmul_launch.linear(x, packed, bias)), tokens
        assert product_error(y, x, dense, bias) < TOLERANCE[dtype], tokens
    assert torch.equal(matmul_launch.dequantize(packed, torch.float32), weight.dequantize())


@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("n, k", [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)])
def test_every_configuration_of_the_table_and_of_the_rule(n, k, dtype):
    """Each forced on its own shape, at one token, at a full tile and at one token more."""
    from awq.kernels.triton import configs, launcher, matmul_launch

    weight = random_weight(k, n, 128, n + k, "cuda")
    packed, dense = pack(weight), weight.dequantize(torch.float64)
    chosen = {
        configs.config_for(*launcher.architecture(0), packed.shape, tokens, dtype)
        for tokens in configs.BUCKETS
    }
    for config in chosen - {None}:
        for tokens in (1, config.bm, config.bm + 1):
            x = torch.randn(tokens, k, device="cuda").to(dtype)
            y = matmul_launch.fused(x, packed, None, config)
            assert product_error(y, x, dense) < TOLERANCE[dtype], (config, tokens)


@pytest.mark.parametrize("n, k", [(28672, 4096), (672, 1536)])
def test_a_product_with_its_activation_rounds_as_the_two(n, k):
    from awq.kernels.triton import decode_launch, matmul_launch
    from awq.kernels.triton.configs import GATE_INTERLEAVE

    packed = pack(random_weight(k, n, 128, n, "cuda"))
    for tokens in (1, 7, 16, 40, 64, 100, 300, 1000, 2000):
        x = torch.randn(tokens, k, device="cuda").half()
        plain = matmul_launch.linear(x, packed, None)
        expected = decode_launch.activate(plain, "silu", True, GATE_INTERLEAVE).float()
        y = decode_launch.gated(x, packed, None, "silu", GATE_INTERLEAVE)
        again = decode_launch.gated(x, packed, None, "silu", GATE_INTERLEAVE)
        assert torch.equal(y, again), tokens
        assert (y.float() - expected).norm() < 1e-4 * expected.norm(), tokens


@pytest.fixture(scope="module")
def weight():
    return random_weight(2048, 1024, 128, 7)


@pytest.fixture
def linear(weight):
    """On the GPU, in the layout of its kernels."""
    linear = WQLinear.from_quantized(weight, torch.randn(1024).half(), "gemm").to("cuda")
    prepare(linear, torch.float16)
    return linear


@pytest.mark.parametrize("fmt", ["gemm", "gemv", "gemv_fast"])
def test_a_linear_keeps_its_state_wherever_it_goes(weight, fmt):
    linear = WQLinear.from_quantized(weight, torch.randn(1024).half(), fmt)
    before = {key: tensor.clone() for key, tensor in linear.state_dict().items()}
    dense = weight.dequantize(torch.float64)
    x = torch.randn(4, 2048).half()
    linear = linear.to("cuda")
    y = linear(x.cuda())
    assert linear.layout == "planar"
    assert product_error(y.cpu(), x, dense, linear.bias.cpu()) < 1e-3
    for key, tensor in linear.state_dict().items():
        assert torch.equal(tensor.cpu().view(torch.uint8), before[key].view(torch.uint8)), key
    moved = linear.to("cpu")
    assert product_error(moved(x), x, dense, moved.bias) < 1e-3


@pytest.mark.parametrize("tokens", [1, 40, 2000])
def test_a_captured_call_equals_an_eager_one(linear, tokens):
    static = torch.randn(tokens, 2048, device="cuda").half()
    linear(static)
    graph, out = captured(lambda: linear(static))
    for _ in range(3):
        static.copy_(torch.randn_like(static))
        graph.replay()
        assert torch.equal(out, linear(static))


def test_capture_before_the_weight_was_moved_to_its_layout(weight):
    linear = WQLinear.from_quantized(weight, None, "gemm").to("cuda")
    static = torch.randn(2, 2048, device="cuda").half()
    graph, out = captured(lambda: linear(static))
    graph.replay()
    assert linear.layout == "gemm"
    assert product_error(out, static, weight.dequantize(torch.float64).cuda()) < 1e-3


def captured(call):
    """(CUDA graph of one call, what it returns)"""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def test_compiled_without_a_break(linear):
    x = torch.randn(3, 2048, device="cuda").half()
    assert torch.equal(torch.compile(linear, fullgraph=True)(x), linear(x))


def test_gradient_of_the_input(linear, weight):
    x = torch.randn(5, 2048, device="cuda").half().requires_grad_()
    gradient = torch.randn(5, 1024, device="cuda").half()
    linear(x).backward(gradient)
    assert product_error(x.grad, gradient, weight.dequantize(torch.float64).cuda().t()) < 1e-3


@pytest.fixture(scope="module")
def split():
    """(weight whose products are split over programs, inputs, their products on one stream)"""
    from awq.kernels.triton import matmul_launch

    packed = pack(random_weight(14336, 4096, 128, 9, "cuda"))
    inputs = [torch.randn(m, 14336, device="cuda").half() for m in (1, 7) for _ in range(8)]
    return packed, inputs, [matmul_launch.linear(x, packed, None) for x in inputs]


def test_two_streams_share_a_weight(split):
    """Sums over a split and their counters are of one stream each."""
    from awq.kernels.triton import matmul_launch

    packed, inputs, expected = split
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    outputs = []
    for repeat in range(20):
        for number, x in enumerate(inputs):
            with torch.cuda.stream(streams[(number + repeat) % 2]):
                outputs.append((number, matmul_launch.linear(x, packed, None)))
    torch.cuda.synchronize()
    assert all(torch.equal(expected[number], y) for number, y in outputs)


def test_two_graphs_replay_side_by_side(split):
    from awq.kernels.triton import matmul_launch

    packed, inputs, expected = split
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    runs = [
        captured(lambda x=x: [matmul_launch.linear(x, packed, None) for _ in range(20)])
        for x in inputs[:2]
    ]
    for _ in range(5):
        for stream, (graph, _) in zip(streams, runs):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, products), y in zip(runs, expected):
        assert all(torch.equal(product, y) for product in products)


# outputs, inputs, group, experts, experts of a token
EXPERTS = [
    (512, 1024, 128, 8, 2),
    (72, 288, 32, 5, 3),
    (200, 576, 576, 64, 8),
    (1000, 768, 96, 3, 1),
]


@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", EXPERTS, ids=lambda case: "x".join(map(str, case)))
def test_products_of_experts_equal_float64(case, dtype):
    """Eager and captured give the same bits."""
    n, k, group, count, top = case
    parts = [random_weight(k, n, group, seed, "cuda") for seed in range(count)]
    packed = stack_experts([pack(part) for part in parts])
    dense = torch.stack([part.dequantize(torch.float64) for part in parts])
    for tokens, shared in itertools.product((1, 3, 17, 64, 300), (True, False)):
        rows = (tokens,) if shared else (tokens, top)
        x = torch.randn(*rows, k, device="cuda").to(dtype)
        chosen = torch.rand(tokens, count, device="cuda").topk(top).indices
        weights = torch.rand(tokens, top, device="cuda")
        bias = torch.randn(count, n, device="cuda").to(dtype) if tokens % 2 else None
        y = moe_linear(x, packed, chosen, weights, bias)
        graph, again = captured(lambda a=(x, packed, chosen, weights, bias): moe_linear(*a))
        graph.replay()
        assert torch.equal(y, again), (tokens, shared)
        expected = routed_sum(x, dense, chosen, weights, bias)
        error = float((y.double() - expected).norm() / expected.norm())
        assert error < TOLERANCE[dtype], (tokens, shared)


@pytest.mark.parametrize("case", EXPERTS, ids=lambda case: "x".join(map(str, case)))
def test_experts_in_float32_are_captured(case):
    """The reference serves them, and no number of an expert comes to the host."""
    n, k, group, count, top = case
    packed, dense = stacked(n, k, group, count, 0)
    for tokens in (1, 3, 17):
        x = torch.randn(tokens, k, device="cuda")
        chosen = torch.rand(tokens, count, device="cuda").topk(top).indices
        weights = torch.rand(tokens, top, device="cuda")
        graph, y = captured(lambda a=(x, packed, chosen, weights): moe_linear(*a))
        graph.replay()
        expected = routed_sum(x, dense, chosen, weights, None)
        error = float((y.double() - expected).norm() / expected.norm())
        assert error < 1e-5, tokens


def routed_sum(x, dense, chosen, weights, bias):
    """Σ over a token's experts of weight · (W x + bias), float64 [tokens, out]."""
    top = chosen.shape[1]
    rows = x.double()
    if rows.dim() == 2:
        rows = rows.unsqueeze(1).expand(-1, top, -1)
    products = [torch.einsum("ti,toi->to", rows[:, j], dense[chosen[:, j]]) for j in range(top)]
    y = torch.stack(products, 1)
    if bias is not None:
        y = y + bias[chosen].double()
    return (y * weights.double().unsqueeze(-1)).sum(1)


def stacked(out_features, in_features, group, count, seed):
    """(a stack of different weights for a GPU, their dense values [count, out, in])."""
    weights = [
        random_weight(in_features, out_features, group, seed + i, "cuda") for i in range(count)
    ]
    packed = [pack(weight) for weight in weights]
    dense = torch.stack([weight.dequantize(torch.float64) for weight in weights])
    return stack_experts(packed), dense


# outputs, inputs, group, bias, activation: whole blocks, seven of them, tails, a whole row. With an
# activation outputs come in pairs of runs (`FusedBlock._interleaved`), so there is no tail.
ONE_TOKEN = [
    (5120, 2048, 128, False, ""),
    (2048, 4096, 128, True, ""),
    (1152, 896, 128, False, "silu"),
    (72, 136, 136, True, ""),
    (224, 1536, 256, True, "gelu"),
]


@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("n, k, group, biased, name", ONE_TOKEN)
def test_one_token_on_weights_that_are_held(n, k, group, biased, name, dtype):
    from awq.kernels.triton import direct_launch
    from awq.kernels.triton.configs import GATE_INTERLEAVE

    if direct_launch.kernels() is None:
        return  # a Triton before 3.6; the products in steps serve
    weight = random_weight(k, n, group, n + k, "cuda")
    packed, dense = pack(weight), weight.dequantize(torch.float64)
    bias = torch.randn(n, device="cuda").to(dtype) if biased else None
    x = torch.randn(1, k, device="cuda").to(dtype)
    expected = x.double() @ dense.t() + (0 if bias is None else bias.double())
    if name:
        in_turn = expected.to(dtype).double().view(-1, 2, GATE_INTERLEAVE)
        gate, up = in_turn[:, 0], in_turn[:, 1]
        activated = ACTIVATIONS[name](gate).to(dtype).double()
        expected = (activated * up).reshape(1, -1)
    for warps in (2, 4, 8):
        form = direct_launch.Direct(16, warps)
        y = direct_launch.product(x, packed, bias, form, name)
        assert torch.equal(y, direct_launch.product(x, packed, bias, form, name))
        error = (y.double() - expected).norm() / expected.norm()
        assert error < 3 * TOLERANCE[dtype], (warps, error)


@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("hidden, inner, group", [(2048, 768, 128), (384, 256, 128)])
def test_the_experts_of_one_token(hidden, inner, group, alternating, dtype):
    """Parts and their sum, with biases; an expert that there is not is NaN."""
    from awq.kernels.triton import direct_launch
    from awq.kernels.triton.direct_launch import Direct

    if direct_launch.kernels() is None:
        return
    first, dense_first = stacked(2 * inner, hidden, group, 5, 1)
    second, dense_second = stacked(hidden, inner, group, 5, 7)
    biases = [torch.randn(5, n, device="cuda").to(dtype) for n in (2 * inner, hidden)]
    index = torch.tensor([[4, 0, 2]], dtype=torch.int32, device="cuda")
    weights = torch.rand(1, 3, device="cuda")
    x = torch.randn(1, hidden, device="cuda").to(dtype)
    expected = []
    for expert, weight in zip(index[0].tolist(), weights[0].double()):
        h = (x[0].double() @ dense_first[expert].t() + biases[0][expert].double()).to(dtype)
        gate, up = (h[::2], h[1::2]) if alternating else h.chunk(2)
        h = (ACTIVATIONS["silu"](gate.double()).to(dtype).double() * up.double()).to(dtype)
        out = h.double() @ dense_second[expert].t() + biases[1][expert].double()
        expected.append(weight * out)
    expected = torch.stack(expected)

    def parts(index):
        h = direct_launch.expert_product(
            x, first, biases[0], index, None, Direct(16, 2, 168), "silu", alternating
        )
        one_by_one = direct_launch.expert_product(
            h, second, biases[1], index, weights, Direct(32, 4), chosen_before=True
        )
        together = direct_launch.expert_sum(
            h, second, biases[1], index, weights, Direct(16, 8), chosen_before=True
        )
        return one_by_one[0], together[0, 0]

    found, total = parts(index)
    limit = 3 * TOLERANCE[dtype]
    assert (found.double() - expected).norm() / expected.norm() < limit
    assert (total.double() - expected.sum(0)).norm() / expected.sum(0).norm() < limit
    index[0, 1] = 5
    broken, total = parts(index)
    assert broken[1].isnan().all() and torch.equal(broken[[0, 2]], found[[0, 2]])
    assert total.isnan().all()
