"""Int4 products on a GPU, at the sizes of real models and at odd ones: against float64, the same
bits twice, in CUDA graphs, compiled, on two streams, backward.

The interpreter runs the same kernels on small shapes in `test_triton.py`. Compiling takes most of
the time: `PYTEST_ADDOPTS="-n 12 --dist loadscope" make test-gpu` spreads modules over processes.
"""

import math

import pytest
import torch
from kernel_weights import TOLERANCE, pack, product_error, random_weight

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
