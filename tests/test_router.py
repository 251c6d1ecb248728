"""How a mixture chooses its experts, read off one run of it; and what is not read."""

import sys
from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from awq.backends import operator
from awq.core.weight import round_to_nearest
from awq.generate.read.router import read_mixture
from awq.generate.run.block import FusedMixture
from awq.kernels.reference.decode import add_norm
from awq.kernels.reference.mixture import route
from awq.kernels.specs import Norm
from awq.models.base import BaseAWQForCausalLM
from awq.nn.expose import expose_experts
from awq.nn.linear import WQLinear
from awq.nn.packed_experts import pack_experts
from awq.nn.surgery import get_weight, named_linears, replace_module

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from tiny_kinds import all_kinds, build

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

    def __init__(self, choose, activation=F.silu, shared=None, gated=False):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=True)
        self.decoy = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.register_buffer("correction", torch.randn(EXPERTS) / 4)
        self.experts, self.choose = Experts(activation), choose
        self.shared = shared
        self.shared_gate = nn.Linear(WIDTH, 1, bias=False) if gated else None

    def forward(self, x):
        rows = x.view(-1, x.shape[-1])
        index, weights = self.choose(self, F.linear(rows, self.router.weight), rows)
        y = self.experts(rows, index, weights)
        if self.shared is not None:
            more = self.shared(rows)
            if self.shared_gate is not None:
                more = self.shared_gate(rows).sigmoid() * more
            y = y + more
        return y.view(x.shape)


class Mlp(nn.Module):
    def __init__(self, activation=None):
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)
        self.act = nn.SiLU() if activation is None else activation

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


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


def of_groups(scores, kept, best):
    """DeepSeek's way to leave out all groups of two but the best."""
    grouped = scores.view(len(scores), -1, 2)
    places = grouped.topk(best, -1).values.sum(-1).topk(kept, -1).indices
    mask = torch.zeros(grouped.shape[:2]).scatter_(1, places, 1).unsqueeze(-1).expand_as(grouped)
    return scores.masked_fill(mask.reshape(scores.shape) == 0, -torch.inf)


def deepseek_v2_in_groups(block, logits, rows):
    score = logits.softmax(-1)
    return tuple(reversed(of_groups(score, 2, 1).topk(TOP)))


def deepseek_v3_in_groups(block, logits, rows):
    score = logits.sigmoid()
    index = of_groups(score + block.correction, 2, 2).topk(TOP, sorted=False).indices
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
    deepseek_v2_in_groups: dict(normalized=False, groups=4, kept=2),
    deepseek_v3_in_groups: dict(
        sigmoid=True, correction="mlp.correction", groups=4, kept=2, group_best=2
    ),
}
SCALED = {deepseek, deepseek_v3_in_groups}


@pytest.mark.parametrize("choose", WAYS)
@torch.no_grad()
def test_routers_are_read(choose):
    block, x = packed_block(choose), torch.randn(2, 24, WIDTH)
    found = read_mixture(block, "mlp", x)
    assert (found.experts, found.activation) == ("mlp.experts", "silu")
    source = found.router
    assert source.weight == "mlp.router.weight" and source.top_k == TOP
    plain = replace(source, sigmoid=False, normalized=True, bias=None, correction=None)
    plain = replace(plain, groups=1, kept=1, group_best=1)
    assert replace(plain, **WAYS[choose]) == source
    assert abs(source.factor - (2.5 if choose in SCALED else 1.0)) < 1e-5

    other = torch.randn(100, WIDTH)
    own = dict(block.named_parameters(prefix="mlp")) | dict(block.named_buffers(prefix="mlp"))
    index, weights = route(other, source.of(own))
    expected_index, expected = choose(block, F.linear(other, block.router.weight), other)
    for tensor, places in ((weights, index), (expected, expected_index)):
        assert tensor.shape == places.shape == (100, TOP)
    order, expected_order = index.long().argsort(1), expected_index.argsort(1)
    assert torch.equal(index.long().gather(1, order), expected_index.gather(1, expected_order))
    torch.testing.assert_close(weights.gather(1, order), expected.gather(1, expected_order))


@pytest.mark.parametrize("size", [0.01, 0.0])
@torch.no_grad()
def test_a_correction_that_moves_no_choice_of_a_few_tokens_is_read(size):
    """AFMoE's after little training; it moves the choice of other tokens."""
    block = packed_block(deepseek)
    block.correction.mul_(size)
    tokens = torch.randn(400, WIDTH)
    score = F.linear(tokens, block.router.weight).sigmoid()
    with_it, without = (
        scores.topk(TOP).indices.sort(-1).values for scores in (score + block.correction, score)
    )
    alike = (with_it == without).all(-1)
    assert bool(alike.all()) == (size == 0)

    x = tokens[alike][:12].view(2, 6, WIDTH)
    found = read_mixture(block, "mlp", x).router
    assert (found.correction, found.sigmoid) == ("mlp.correction", True)


@torch.no_grad()
def test_a_limit_to_groups_that_turns_none_of_a_few_tokens_away_is_not_overlooked():
    """As many groups as experts of a token: not among the ways that are known, and not none."""

    def choose(block, logits, rows):
        values, index = of_groups(logits.softmax(-1), 3, 2).topk(TOP)
        return index, values / values.sum(-1, keepdim=True)

    block = packed_block(choose)
    tokens = torch.randn(400, WIDTH)
    logits = F.linear(tokens, block.router.weight)
    limited, free = (way(block, logits, tokens)[0].sort(-1).values for way in (choose, mixtral))
    alike = (limited == free).all(-1)
    assert 0 < int((~alike).sum()) < 200

    x = tokens[alike][:12].view(2, 6, WIDTH)
    assert read_mixture(block, "mlp", x) is None


def test_the_activation_is_read_too():
    gelu = packed_block(mixtral, F.gelu)
    assert read_mixture(gelu, "mlp", torch.randn(1, 9, WIDTH)).activation == "gelu"


@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_an_mlp_that_all_tokens_share_is_read(gated):
    block = packed_block(mixtral, shared=Mlp(), gated=gated)
    x = torch.randn(2, 24, WIDTH)
    found = read_mixture(block, "mlp", x)
    assert found.shared.first.names == ("mlp.shared.gate", "mlp.shared.up")
    assert (found.shared.last, found.shared.activation_name) == ("mlp.shared.down", "silu")
    assert found.shared_gate == ("mlp.shared_gate" if gated else None)

    holder = nn.Module()
    holder.mlp = block
    fused = FusedMixture(found, holder)
    y = fused(x, *route(x.view(-1, WIDTH), fused.router)).sum(-2)
    torch.testing.assert_close(y, block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "args, shared",
    [
        ((drawn,), None),
        ((mixtral,), nn.Linear(WIDTH, WIDTH)),
        ((mixtral,), nn.Sequential(Mlp(), nn.Tanh())),
        ((mixtral, torch.tanh), None),
    ],
)
def test_what_is_not_known_stays_the_models_own(args, shared):
    block = packed_block(*args, shared=shared)
    assert read_mixture(block, "mlp", torch.randn(2, 24, WIDTH)) is None


KINDS = {str(kind): kind for kind in all_kinds()}
# (whether every MLP is a mixture, groups of experts, gated)
MIXTURES = {
    "qwen2_moe:causal": (True, 1, True),
    "deepseek_v3:causal": (False, 2, False),
    "glm4_moe:causal": (False, 1, False),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_that_share_an_mlp_decode_on_their_parts(name):
    """The tokens of transformers, with routing, experts and the shared MLP fused."""
    if not is_dataclass(transformers.LlamaConfig):
        pytest.skip("transformers has no settings as dataclasses")
    if name not in KINDS:
        pytest.skip(f"transformers has no {name}")
    torch.manual_seed(0)
    model = build(KINDS[name]).float().eval()
    expose_experts(model)
    for place, linear in list(named_linears(model).items()):
        weight, bias = get_weight(linear), getattr(linear, "bias", None)
        if place.endswith(("lm_head", "gate")) or weight.shape[1] % 32:
            continue  # routers and gates of shared experts stay dense
        packed = round_to_nearest(weight.data, 32)
        linear = WQLinear.from_quantized(packed, bias, dtype=torch.float32)
        replace_module(model, place, linear)
    pack_experts(model)
    wrapper = BaseAWQForCausalLM(model, name)
    wrapper.fuse_layers(40, 2)

    ids = torch.randint(3, 60, (2, 9))
    settings = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=16,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(wrapper.generate(**settings), model.generate(**settings))
    routed = [block.mlp.routed for block in wrapper.fuse().plan.blocks]
    found = [mixture for mixture in routed if mixture is not None]
    every, groups, gated = MIXTURES[name]
    assert found and (len(found) == len(routed)) == every
    assert all(mixture.shared is not None for mixture in found)
    assert all((mixture.shared_gate is not None) == gated for mixture in found)
    assert {mixture.router.groups for mixture in found} == {groups}


@pytest.mark.parametrize("normed", [False, True])
def test_every_backend_adds_up_the_parts_of_a_branch(normed):
    x, parts = torch.randn(2, 3, 40), torch.randn(2, 3, 4, 40)
    norm = Norm(torch.rand(40), None, 1e-6, False) if normed else None
    found = operator("add_norm", x.device, x.dtype)(x, parts, 0.5, norm)
    for ours, expected in zip(found, add_norm(x, parts, 0.5, norm)):
        torch.testing.assert_close(ours, expected)
