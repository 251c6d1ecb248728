"""Folds preserve the function of every family's blocks, and the ones each family must have are
found."""

import pytest
import torch
import zoo

from awq.folds import TOLERANCE, Fold, InputGroup, apply_fold, discover, prove
from awq.folds.proof import holds
from awq.nn.block_calls import BlockCall, map_tensors
from awq.nn.blocks import find_block_lists
from awq.nn.hooks import hooked
from awq.nn.recording import record_block_calls
from awq.nn.surgery import named_linears


def probes(model, lists):
    """(one-token, many-token) calls of block 0 of the first list, with the blocks' later inputs
    computed on the way."""
    many = zoo.token_batch()
    single = {k: v.reshape(-1, 1) for k, v in zoo.token_batch(4, 16, seed=2).items()}
    return record_block_calls(model, lists, [single]), record_block_calls(model, lists, [many])


@torch.no_grad()
def fold_everything(model):
    """Applies a random scale through every proven fold of every block; returns the groups of the
    last block."""
    lists = find_block_lists(model)
    single, many = probes(model, lists)
    h1, hn = single.hidden[0][0], many.hidden[0][0]
    for j, block in enumerate(lists[0][1]):
        c1, cn = single.calls[0][0][j], many.calls[0][0][j]
        before = {k: v.clone() for k, v in block.state_dict().items()}
        groups = prove(block, discover(block, [(c1, h1)], [(cn, hn)]), [(cn, hn)])
        assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items()), (
            "discovery left a trace"
        )
        assert sorted(n for g in groups for n in g.consumers) == sorted(named_linears(block))
        h1, hn = c1.run(block, h1), cn.run(block, hn)
        for group in groups:
            if group.fold is not None:
                apply_fold(
                    block, group.fold, group.fold.tie(torch.rand(group.in_features) * 1.5 + 0.5)
                )
    return groups


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_function_is_preserved(family):
    if not zoo.available(family):
        pytest.skip(f"transformers has no {family}")
    model = zoo.tiny_model(family)
    inputs = zoo.token_batch(seed=7)
    before = zoo.outputs(model, **inputs)
    groups = fold_everything(model)
    after = zoo.outputs(model, **inputs)
    assert (after - before).norm() / before.norm() < 1e-4
    assert any(g.fold for g in groups), [g.reason for g in groups]


EXPECTED = {  # consumers whose fold must be found, and its producer
    "llama": {
        "self_attn.q_proj": "input_layernorm",
        "self_attn.o_proj": "self_attn.v_proj",
        "mlp.gate_proj": "post_attention_layernorm",
        "mlp.down_proj": "mlp.up_proj",
    },
    "phi3": {"self_attn.o_proj": "self_attn.qkv_proj", "mlp.down_proj": "mlp.gate_up_proj"},
    "gemma2": {"self_attn.q_proj": "input_layernorm", "self_attn.o_proj": "self_attn.v_proj"},
    "gpt_neox": {
        "attention.query_key_value": "input_layernorm",
        "attention.dense": "attention.query_key_value",
    },
    "bloom": {"self_attention.dense": "self_attention.query_key_value"},
    "falcon": {"self_attention.dense": "self_attention.query_key_value"},
    "opt": {"fc1": "final_layer_norm", "fc2": "fc1"},
    "gpt2": {"attn.c_attn": "ln_1", "attn.c_proj": "attn.c_attn", "mlp.c_fc": "ln_2"},
    "modernbert": {"attn.Wo": "attn.Wqkv", "mlp.Wo": "mlp.Wi"},
    "bert": {"attention.output.dense": "attention.self.value"},
    "gptj": {"attn.out_proj": "attn.v_proj", "mlp.fc_in": "ln_1"},
    "mpt": {"attn.Wqkv": "norm_1", "attn.out_proj": "attn.Wqkv"},
    "stablelm": {
        "mlp.gate_proj": "input_layernorm",
        "self_attn.o_proj": "self_attn.v_proj",
        "mlp.down_proj": "mlp.up_proj",
    },
    "cohere": {
        "mlp.gate_proj": "input_layernorm",
        "self_attn.o_proj": "self_attn.v_proj",
        "mlp.down_proj": "mlp.up_proj",
    },
}
FORBIDDEN = {
    "bert": ["attention.self.query", "intermediate.dense", "output.dense"],
    "gpt_neox": ["mlp.dense_4h_to_h"],
    "gpt2": ["mlp.c_proj"],
    "nomic_bert": ["self_attn.q_proj", "mlp.gate_proj"],
    "olmo2": ["self_attn.q_proj", "mlp.gate_proj"],
}


@pytest.mark.parametrize("family", sorted({*EXPECTED, *FORBIDDEN}))
def test_known_folds(family):
    if not zoo.available(family):
        pytest.skip(f"transformers has no {family}")
    groups = fold_everything(zoo.tiny_model(family))
    found = {name: g.fold.producer for g in groups if g.fold for name in g.consumers}
    for consumer, producer in EXPECTED.get(family, {}).items():
        assert found.get(consumer) == producer, found
    for consumer in FORBIDDEN.get(family, []):
        assert consumer not in found


def test_tied_scales_do_not_depend_on_the_order_of_channels():
    """A GPU adds channels of one row in any order; with float sums two runs gave two
    checkpoints."""
    generator = torch.Generator().manual_seed(0)
    rows, scale = torch.arange(24).repeat(40), torch.rand(960, generator=generator) + 0.1
    rows[5] = -1
    order = torch.randperm(960, generator=generator)
    tied, shuffled = (
        Fold((), "", "linear", r).tie(s) for r, s in ((rows, scale), (rows[order], scale[order]))
    )
    assert torch.equal(shuffled, tied[order]) and tied[5] == 1
    assert (tied[7::24].log() - scale[7::24].log().mean()).abs().max() < 1e-6


def test_grouped_query_scales_are_tied():
    groups = fold_everything(zoo.tiny_model("llama"))
    fold = next(g.fold for g in groups if "self_attn.o_proj" in g.consumers)
    assert len(fold.rows.unique()) == 16 and len(fold.rows) == 32
    tied = fold.tie(torch.rand(32) + 0.5)
    for row in fold.rows.unique():
        assert len(tied[fold.rows == row].unique()) == 1


def first_block(family):
    """Block 0 of a tiny model with its (one-token, many-token) calls."""
    model = zoo.tiny_model(family)
    lists = find_block_lists(model)
    single, many = probes(model, lists)
    return (
        lists[0][1][0],
        [(single.calls[0][0][0], single.hidden[0][0])],
        [(many.calls[0][0][0], many.hidden[0][0])],
    )


@pytest.mark.parametrize(
    ("family", "fold"),
    [
        # the residual reads it too
        ("bert", Fold(("intermediate.dense",), "attention.output.LayerNorm", "norm")),
        # v_proj is forgotten
        ("llama", Fold(("self_attn.q_proj", "self_attn.k_proj"), "input_layernorm", "norm")),
        # the wrong kind
        ("gemma", Fold(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "norm")),
        # a GELU between
        ("gpt_neox", Fold(("mlp.dense_4h_to_h",), "mlp.dense_h_to_4h", "linear", torch.arange(48))),
        # heads mistaken
        ("llama", Fold(("self_attn.o_proj",), "self_attn.v_proj", "linear", torch.arange(32) % 16)),
    ],
)
def test_false_folds_are_dropped_by_name_and_true_ones_stay(family, fold):
    block, single, many = first_block(family)
    width = block.get_submodule(fold.consumers[0]).in_features
    others = [
        g for g in discover(block, single, many) if not set(g.consumers) & set(fold.consumers)
    ]
    before = {k: v.clone() for k, v in block.state_dict().items()}
    *kept, dropped = prove(block, [*others, InputGroup(fold.consumers, width, fold)], many)
    assert dropped.fold is None and fold.producer in dropped.reason
    assert [g.fold for g in kept] == [g.fold for g in others]
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


def test_proof_puts_parameters_back_even_when_the_block_fails():
    block, single, many = first_block("llama")
    groups = discover(block, single, many)
    before = {k: v.clone() for k, v in block.state_dict().items()}

    class Breaks(BlockCall):
        runs = 0

        def outputs(self, block, hidden):
            Breaks.runs += 1
            if Breaks.runs == 2:
                raise RuntimeError("out of memory")
            return super().outputs(block, hidden)

    call, hidden = many[0]
    with pytest.raises(RuntimeError):
        holds(block, groups, [(Breaks(call.args, call.kwargs, call.where), hidden)])
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())


def test_a_first_look_finds_the_same_folds_with_fewer_tokens():
    block, single, many = first_block(
        "bert"
    )  # whose MLP's second linear many guesses are tried for
    whole = discover(block, single, many)
    call, hidden = single[0]
    rows = len(hidden)
    inputs = [hidden[:4], hidden[4:]]

    def part(length):
        return lambda t: t[:length] if t.dim() and len(t) == rows else t

    def call_for(h):
        args, kwargs = map_tensors((call.args, call.kwargs), part(len(h)))
        return BlockCall(args, kwargs, call.where)

    parted = [(call_for(h), h) for h in inputs]
    tokens = []
    query = "attention.self.query"
    with hooked(block, [query], before=lambda _, args: tokens.append(len(args[0]))):
        found = discover(block, parted, many)
        with_look, tokens[:] = sum(tokens), []
        discover(block, single, many)
    assert [(g.consumers, g.fold and g.fold.producer) for g in found] == [
        (g.consumers, g.fold and g.fold.producer) for g in whole
    ]
    assert 2 * with_look < sum(tokens)


def test_a_bfloat16_block_is_proven_in_float32():
    block, single, many = first_block("llama")
    half = [
        [(call.to(h.device, torch.bfloat16), h.bfloat16()) for call, h in calls]
        for calls in (single, many)
    ]
    block.to(torch.bfloat16)
    groups = prove(block, discover(block, *half), half[1])
    assert all(g.fold for g in groups) and next(block.parameters()).dtype == torch.bfloat16


class Experts(torch.nn.Module):
    """Two experts in one 3-D parameter, which no list of linears shows; a router chooses between
    them."""

    def __init__(self):
        super().__init__()
        self.norm, self.router, self.shared = (
            torch.nn.LayerNorm(16),
            torch.nn.Linear(16, 2),
            torch.nn.Linear(16, 16),
        )
        self.experts = torch.nn.Parameter(torch.randn(2, 16, 16))
        self.rare = torch.nn.Linear(16, 16)  # called for longer sequences only

    def forward(self, hidden):
        x = self.norm(hidden)
        mixed = torch.einsum("bte,btd,edf->btf", self.router(x).softmax(-1), x, self.experts)
        return hidden + mixed + self.shared(x) + (self.rare(mixed) if hidden.shape[1] > 1 else 0)


def test_a_reader_that_cannot_be_scaled_forbids_the_fold():
    torch.manual_seed(0)
    block, call = Experts(), BlockCall((), {})
    many, single = [(call, torch.randn(2, 6, 16))], [(call, torch.randn(20, 1, 16))]
    groups = prove(block, discover(block, single, many), many)
    assert sorted(n for g in groups for n in g.consumers) == ["rare", "router", "shared"]
    assert all(g.fold is None and g.reason for g in groups)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_expert_models_do_not_crash_and_keep_their_function(family):
    extra = dict(
        num_experts=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = zoo.build(family, extra)
    inputs = zoo.token_batch(seed=7)
    before = zoo.outputs(model, **inputs)
    groups = fold_everything(model)
    assert (zoo.outputs(model, **inputs) - before).norm() / before.norm() < TOLERANCE
    assert any(g.fold for g in groups)
