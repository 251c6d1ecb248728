"""How a mixture chooses its experts, read off one run of it; and what is not read."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from awq.core.weight import round_to_nearest
from awq.generate.read.router import read_mixture
from awq.kernels.reference.mixture import route
from awq.nn.expose import expose_experts
from awq.nn.linear import WQLinear
from awq.nn.packed_experts import pack_experts
from awq.nn.surgery import replace_module

EXPERTS, TOP, WIDTH, INNER = 8, 3, 32, 16


class Experts(nn.Module):
    """As transformers 5 holds them."""

    def __init__(self, activation=F.silu):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH) / 4)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 4)
        self.act_fn = activation

    def forward(self, hidden_states, top_k_index, top_k_weights):
        gate_up = torch.einsum("ti,tkoi->tko", hidden_states, self.gate_up_proj[top_k_index])
        gate, up = gate_up.chunk(2, -1)
        y = torch.einsum("tki,tkoi->tko", self.act_fn(gate) * up, self.down_proj[top_k_index])
        return (y * top_k_weights.unsqueeze(-1)).sum(1)


class Block(nn.Module):
    """A mixture whose router is written as models write theirs."""

    def __init__(self, choose, activation=F.silu, shared=False):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=True)
        self.decoy = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.register_buffer("correction", torch.randn(EXPERTS) / 4)
        self.experts, self.choose = Experts(activation), choose
        self.shared = nn.Linear(WIDTH, WIDTH) if shared else None

    def forward(self, x):
        rows = x.view(-1, x.shape[-1])
        index, weights = self.choose(self, F.linear(rows, self.router.weight), rows)
        y = self.experts(rows, index, weights)
        return (y if self.shared is None else y + self.shared(rows)).view(x.shape)


def mixtral(block, logits, rows):
    values, index = logits.softmax(-1).topk(TOP)
    return index, values / values.sum(-1, keepdim=True)


def of_the_chosen(block, logits, rows):
    values, index = logits.topk(TOP)
    return index, values.softmax(-1)


def as_they_are(block, logits, rows):
    values, index = logits.softmax(-1).topk(TOP)
    return index, values


def biased(block, logits, rows):
    return mixtral(block, block.router(rows), rows)


def deepseek(block, logits, rows):
    score = logits.sigmoid()
    index = (score + block.correction).topk(TOP, sorted=False).indices
    weights = score.gather(1, index)
    return index, 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20)


def drawn(block, logits, rows):
    return mixtral(block, logits.tanh(), rows)


def packed_block(*args, **kwargs):
    torch.manual_seed(0)
    block = Block(*args, **kwargs)
    assert not expose_experts(block)
    for name, module in list(block.experts.named_modules()):
        if isinstance(module, nn.Linear):
            weight = round_to_nearest(module.weight.data, 16)
            packed = WQLinear.from_quantized(weight, None, dtype=torch.float32)
            replace_module(block.experts, name, packed)
    assert pack_experts(block) == 1
    return block.eval()


WAYS = {
    mixtral: dict(),
    of_the_chosen: dict(),
    as_they_are: dict(normalized=False),
    biased: dict(bias="mlp.router.bias"),
    deepseek: dict(sigmoid=True, correction="mlp.correction"),
}


@pytest.mark.parametrize("choose", WAYS)
@torch.no_grad()
def test_routers_are_read(choose):
    block, x = packed_block(choose), torch.randn(2, 24, WIDTH)
    found = read_mixture(block, "mlp", x)
    assert (found.experts, found.activation) == ("mlp.experts", "silu")
    source = found.router
    assert source.weight == "mlp.router.weight" and source.top_k == TOP
    plain = replace(source, sigmoid=False, normalized=True, bias=None, correction=None)
    assert replace(plain, **WAYS[choose]) == source
    assert abs(source.factor - (2.5 if choose is deepseek else 1.0)) < 1e-5

    other = torch.randn(100, WIDTH)
    own = dict(block.named_parameters(prefix="mlp")) | dict(block.named_buffers(prefix="mlp"))
    index, weights = route(other, source.of(own))
    expected_index, expected = choose(block, F.linear(other, block.router.weight), other)
    for tensor, places in ((weights, index), (expected, expected_index)):
        assert tensor.shape == places.shape == (100, TOP)
    order, expected_order = index.long().argsort(1), expected_index.argsort(1)
    assert torch.equal(index.long().gather(1, order), expected_index.gather(1, expected_order))
    torch.testing.assert_close(weights.gather(1, order), expected.gather(1, expected_order))


def test_the_activation_is_read_too():
    gelu = packed_block(mixtral, F.gelu)
    assert read_mixture(gelu, "mlp", torch.randn(1, 9, WIDTH)).activation == "gelu"


@pytest.mark.parametrize(
    "args, shared", [((drawn,), False), ((mixtral,), True), ((mixtral, torch.tanh), False)]
)
def test_what_is_not_known_stays_the_models_own(args, shared):
    block = packed_block(*args, shared=shared)
    assert read_mixture(block, "mlp", torch.randn(2, 24, WIDTH)) is None
