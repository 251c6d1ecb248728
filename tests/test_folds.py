"""Folds preserve the function of every family's blocks, and the ones each family must have are found."""

import pytest
import torch
import zoo

from awq.folds import apply_fold, discover, prove
from awq.nn.blocks import find_block_lists, record_block_calls
from awq.nn.surgery import named_linears


def probes(model, lists):
    """(one-token, many-token) calls of block 0 of the first list, with the blocks' later inputs computed on the way."""
    many = zoo.token_batch()
    single = {k: v.reshape(-1, 1) for k, v in zoo.token_batch(4, 16, seed=2).items()}
    return record_block_calls(model, lists, [single]), record_block_calls(model, lists, [many])


@torch.no_grad()
def fold_everything(model):
    """Applies a random scale through every proven fold of every block; returns the groups of the last block."""
    lists = find_block_lists(model)
    single, many = probes(model, lists)
    h1, hn = single.hidden[0][0], many.hidden[0][0]
    for j, block in enumerate(lists[0][1]):
        c1, cn = single.calls[0][0][j], many.calls[0][0][j]
        before = {k: v.clone() for k, v in block.state_dict().items()}
        groups = prove(block, discover(block, [(c1, h1)], [(cn, hn)]), [(cn, hn)])
        assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items()), "discovery left a trace"
        assert sorted(n for g in groups for n in g.consumers) == sorted(named_linears(block))
        h1, hn = c1.run(block, h1), cn.run(block, hn)
        for group in groups:
            if group.fold is not None:
                apply_fold(block, group.fold, group.fold.tie(torch.rand(group.in_features) * 1.5 + 0.5))
    return groups


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_function_is_preserved(family):
    if not zoo.available(family):
        pytest.skip(f"{family} is not in this transformers")
    model = zoo.tiny_model(family)
    inputs = zoo.token_batch(seed=7)
    before = zoo.outputs(model, **inputs)
    groups = fold_everything(model)
    after = zoo.outputs(model, **inputs)
    assert (after - before).norm() / before.norm() < 1e-4
    assert any(g.fold for g in groups), [g.reason for g in groups]


EXPECTED = {  # consumers whose fold must be found, and its producer
    "llama": {"self_attn.q_proj": "input_layernorm", "self_attn.o_proj": "self_attn.v_proj",
              "mlp.gate_proj": "post_attention_layernorm", "mlp.down_proj": "mlp.up_proj"},
    "phi3": {"self_attn.o_proj": "self_attn.qkv_proj", "mlp.down_proj": "mlp.gate_up_proj"},
    "gemma2": {"self_attn.q_proj": "input_layernorm", "self_attn.o_proj": "self_attn.v_proj"},
    "gpt_neox": {"attention.query_key_value": "input_layernorm", "attention.dense": "attention.query_key_value"},
    "bloom": {"self_attention.dense": "self_attention.query_key_value"},
    "falcon": {"self_attention.dense": "self_attention.query_key_value"},
    "opt": {"fc1": "final_layer_norm", "fc2": "fc1"},
    "gpt2": {"attn.c_attn": "ln_1", "attn.c_proj": "attn.c_attn", "mlp.c_fc": "ln_2"},
    "modernbert": {"attn.Wo": "attn.Wqkv", "mlp.Wo": "mlp.Wi"},
    "bert": {"attention.output.dense": "attention.self.value"},
}  # fmt: skip
FORBIDDEN = {"bert": ["attention.self.query", "intermediate.dense", "output.dense"], "gpt_neox": ["mlp.dense_4h_to_h"],
             "gpt2": ["mlp.c_proj"], "olmo2": ["self_attn.q_proj", "mlp.gate_proj"]}  # fmt: skip


@pytest.mark.parametrize("family", sorted({*EXPECTED, *FORBIDDEN}))
def test_known_folds(family):
    groups = fold_everything(zoo.tiny_model(family))
    found = {name: g.fold.producer for g in groups if g.fold for name in g.consumers}
    for consumer, producer in EXPECTED.get(family, {}).items():
        assert found.get(consumer) == producer, found
    for consumer in FORBIDDEN.get(family, []):
        assert consumer not in found


def test_grouped_query_scales_are_tied():
    groups = fold_everything(zoo.tiny_model("llama"))
    fold = next(g.fold for g in groups if "self_attn.o_proj" in g.consumers)
    assert len(fold.rows.unique()) == 16 and len(fold.rows) == 32
    tied = fold.tie(torch.rand(32) + 0.5)
    for row in fold.rows.unique():
        assert len(tied[fold.rows == row].unique()) == 1


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "bloom", "bert", "modernbert", "distilbert", "mpnet"])
def test_blocks_one_at_a_time_equal_the_model(family, side):
    if side == "left" and family in zoo.ENCODERS:
        pytest.skip("encoders pad on the right")
    model = zoo.tiny_model(family)
    inputs = zoo.token_batch()
    pad = slice(8, None) if side == "right" else slice(0, 4)
    inputs["attention_mask"][1, pad] = 0
    lists = find_block_lists(model)
    seen = []
    handle = lists[0][1][-1].register_forward_hook(lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o))
    zoo.outputs(model, **inputs)
    handle.remove()
    calls = record_block_calls(model, lists, [inputs])
    hidden = calls.hidden[0][0]
    with torch.no_grad():
        for block, call in zip(lists[0][1], calls.calls[0][0]):
            hidden = call.run(block, hidden)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(hidden[real], seen[0][real], rtol=1e-5, atol=1e-5)
