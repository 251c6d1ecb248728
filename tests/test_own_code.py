"""Generation where a part of a block, or of what surrounds the blocks, is of another kind than in
most models: tiny models of `benchmarks/tiny_kinds.py`, beside transformers' own loop."""

import copy
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import transformers

from awq.models.base import BaseAWQForCausalLM

if not dataclasses.is_dataclass(transformers.LlamaConfig):
    pytest.skip("transformers has no settings as dataclasses", allow_module_level=True)

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from tiny_kinds import all_kinds, build, inputs

KINDS = {str(kind): kind for kind in all_kinds()}
LOOKS = {
    "deepseek_v3:causal": ("partly fused", "key vectors"),  # keys of a low rank, narrow values
    "gpt_oss:causal": ("partly fused", "MLP"),  # sinks, a window in every second block
    "qwen3_next:causal": ("partly fused", "exactly once"),  # states of a recurrent mixer
    "nemotron_h:causal": ("partly fused", "exactly once"),  # blocks of one branch
    "bart:causal": ("fused", ""),  # positions that count padding, norms after the additions
    "qwen2_5_vl:vlm": ("fused", ""),  # a tower that text does not reach, rotation in three parts
    "llama4_text:causal": ("unfused", "other keys than a number of the last ones"),  # chunks
}


def generated(name):
    """(the wrapper, the same greedy tokens by transformers' loop, by ours) for rows of different
    lengths, padded on the left."""
    if name not in KINDS:
        pytest.skip(f"transformers has no {name}")
    model = build(KINDS[name]).eval()
    item = inputs(KINDS[name], model, rows=3, length=12, seed=21, padding="left")
    settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    theirs = model.generate(**item, **settings)
    wrapper = BaseAWQForCausalLM(model, name)
    wrapper.fuse_layers(64)
    return wrapper, theirs, wrapper.generate(**item, **settings)


@pytest.mark.parametrize("name", LOOKS)
def test_greedy_equals_transformers(name):
    wrapper, theirs, ours = generated(name)
    state, reason = LOOKS[name]
    assert wrapper.fusion.state == state and reason in wrapper.fusion.reason, wrapper.fusion
    assert torch.equal(ours, theirs)


def test_states_belong_to_one_call():
    """A second call begins anew, whatever the first one left in the mixers."""
    wrapper, theirs, ours = generated("qwen3_next:causal")
    item = inputs(KINDS["qwen3_next:causal"], wrapper.model, rows=2, length=9, seed=5)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    first, second = (wrapper.generate(**item, **settings) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, wrapper.model.generate(**item, **settings))


def test_the_window_of_the_mask_is_the_one_that_counts():
    """Blocks are proven on fewer tokens than a window holds, and may tell attention of one that
    their mask does not have."""
    model = build(KINDS["mistral:causal"]).eval()
    told = copy.deepcopy(model.config)
    told.sliding_window, model.config.sliding_window = 20, None
    for layer in model.model.layers:
        layer.self_attn.config = told
    wrapper = BaseAWQForCausalLM(model, "tiny")
    wrapper.fuse_layers(64)
    item = inputs(KINDS["mistral:causal"], model, rows=1, length=30, seed=5)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(wrapper.generate(**item, **settings), model.generate(**item, **settings))
    assert {plan.attention.window for plan in wrapper.fuse().plan.blocks} == {None}


def test_a_step_that_no_graph_can_record_runs_without_one(monkeypatch, caplog):
    """Operators that copy to the host inside show in no trial; a capture then fails."""
    wrapper, theirs, ours = generated("deepseek_v3:causal")
    decoder = wrapper.fuse()

    def fails():
        raise RuntimeError("cannot copy during capture")

    ids, lengths = torch.tensor([5]), torch.tensor([3], dtype=torch.int32)
    assert decoder._captured(decoder.graphs, fails, ids, lengths) is None and not decoder.graphs
    assert "cannot copy during capture" in caplog.text
    decoder.foreign = False  # our own kernels: that would be a fault of ours
    with pytest.raises(RuntimeError, match="during capture"):
        decoder._captured(decoder.graphs, fails, ids, lengths)
