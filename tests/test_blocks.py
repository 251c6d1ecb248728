"""Blocks run one at a time give what the model itself computes: every family, every block, padding
on either side."""

import pytest
import torch
import zoo

from awq.errors import ModelError
from awq.nn.block_calls import hidden_of
from awq.nn.blocks import find_block_lists
from awq.nn.recording import record_block_calls


@torch.no_grad()
def own_outputs(model, blocks, inputs):
    """Every block's output within the model's own forward."""
    seen = []
    handles = [
        b.register_forward_hook(lambda _m, _a, out: seen.append(hidden_of(out).clone()))
        for b in blocks
    ]
    zoo.outputs(model, **inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
@torch.no_grad()
def test_blocks_one_at_a_time_equal_the_model(family, side):
    if not zoo.available(family):
        pytest.skip(f"transformers has no {family}")
    model = zoo.tiny_model(family)
    inputs = zoo.token_batch()
    if side != "none":
        pad = slice(8, None) if side == "right" else slice(0, 4)
        inputs["attention_mask"][1, pad] = 0
        inputs["input_ids"][1, pad] = 0
    lists = find_block_lists(model)
    blocks = lists[0][1]
    expected = own_outputs(model, blocks, inputs)
    calls = record_block_calls(model, lists, [inputs])
    hidden, real = calls.hidden[0][0], inputs["attention_mask"].bool()
    assert len(expected) == len(blocks)
    for block, call, own in zip(blocks, calls.calls[0][0], expected):
        hidden = call.run(block, hidden)
        torch.testing.assert_close(hidden[real], own[real], rtol=1e-5, atol=1e-5)


def test_recording_leaves_no_trace_and_computes_no_block():
    model = zoo.tiny_model("llama")
    lists = find_block_lists(model)
    inputs, before = zoo.token_batch(), zoo.outputs(model, **zoo.token_batch())
    runs = []
    handle = lists[0][1][0].mlp.register_forward_hook(lambda *_: runs.append(1))
    record_block_calls(model, lists, [inputs, inputs, inputs])
    handle.remove()
    assert len(runs) == 1  # the one tiny pass that learns the shape of the outputs
    assert all("forward" not in b.__dict__ and not b._forward_hooks for b in lists[0][1])
    assert torch.equal(zoo.outputs(model, **inputs), before)


def test_a_forward_set_on_the_instance_comes_back():
    """accelerate's device hooks replace `forward` on the instance; recording must not lose them."""
    model = zoo.tiny_model("llama")
    block = find_block_lists(model)[0][1][0]
    own = block.forward
    block.forward = hooked = lambda *args, **kwargs: own(*args, **kwargs)
    record_block_calls(model, find_block_lists(model), [zoo.token_batch()])
    assert block.forward is hooked


def test_errors_say_what_is_wrong():
    with pytest.raises(ModelError, match="repeated blocks"):
        find_block_lists(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    model = zoo.tiny_model("llama")
    with pytest.raises(ModelError, match="shapes"):
        record_block_calls(
            model,
            find_block_lists(model),
            [{**zoo.token_batch(), "attention_mask": torch.ones(3, 5, 7, 9, 2)}],
        )
    with pytest.raises(ModelError):
        record_block_calls(
            model, find_block_lists(model), [{"input_ids": torch.full((1, 4), 10_000)}]
        )
