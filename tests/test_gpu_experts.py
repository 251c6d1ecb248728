"""Products of a mixture's experts on a GPU: against float64, the same bits captured as eager, and a
token's whole mixture."""

import itertools

import pytest
import torch
from kernel_weights import TOLERANCE, pack, random_weight
from test_gpu_products import HALF, captured

from awq.kernels import moe_linear, stack_experts
from awq.kernels.reference.decode import ACTIVATIONS

pytestmark = pytest.mark.gpu

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
