"""To which residual streams linears add their outputs, found by looking at one forward."""

import pytest
import torch
import zoo

from awq import AwqConfig, QuantizeOptions, quantize_model
from awq.calibration import CalibrationBatch
from awq.nn.block_calls import BlockCall
from awq.nn.blocks import find_block_lists
from awq.nn.hooks import hooked
from awq.nn.walk import BlockWalk
from awq.quantize import block as block_module
from awq.quantize.streams import find_streams


def visits(model):
    """The blocks of a tiny model, and for each its linears that come last in attention and in the
    MLP."""
    for visit in BlockWalk(model, find_block_lists(model), [zoo.token_batch()]):
        width = visit.many[0][1].shape[-1]
        linears = {
            name: m
            for name, m in visit.block.named_modules()
            if getattr(m, "weight", None) is not None
        }
        yield (
            visit,
            [
                name
                for name, m in linears.items()
                if m.weight.dim() == 2 and width in m.weight.shape
            ],
        )


@pytest.mark.parametrize(
    "family, settings, expected",
    [
        ("llama", {}, {"self_attn.o_proj": 1.0, "mlp.down_proj": 1.0}),
        (
            "granite",
            {"residual_multiplier": 0.25},
            {"self_attn.o_proj": 0.25, "mlp.down_proj": 0.25},
        ),
        ("gpt2", {}, {"attn.c_proj": 1.0, "mlp.c_proj": 1.0}),
        ("bert", {}, {"attention.output.dense": 1.0, "output.dense": 1.0}),
        ("gemma2", {}, {}),  # a norm stands between the linear and the stream
        ("gptj", {}, {}),  # attention and MLP are added at once
    ],
)
def test_streams_are_found_where_outputs_are_added(family, settings, expected):
    model = zoo.build(family, zoo.DECODERS.get(family, {}) | settings)
    for visit, names in visits(model):
        found = find_streams(visit.block, names, *visit.many[0])
        assert {name: pytest.approx(factor, rel=1e-3) for name, factor in expected.items()} == {
            name: stream.factor for name, stream in found.items()
        }


def test_stream_and_output_give_what_is_read_next():
    """The law on tokens other than those that were looked at."""
    model = zoo.tiny_model("llama")
    visit, names = next(iter(visits(model)))
    found = find_streams(visit.block, names, *visit.many[0])
    (call, hidden), stream = visit.many[0], found["mlp.down_proj"]
    seen = {}
    hidden = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))
    with (
        torch.no_grad(),
        hooked(
            visit.block, [stream.reader], before=lambda _, args: seen.update(stream=args[0].clone())
        ),
        hooked(
            visit.block,
            ["mlp.down_proj"],
            after=lambda _, output: seen.update(output=output.clone()),
        ),
    ):
        after = call.run(visit.block, hidden)
    torch.testing.assert_close(seen["stream"] + stream.factor * seen["output"], after)


def test_a_silent_linear_has_no_stream():
    block = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 4, bias=False))
    torch.nn.init.zeros_(block[1].weight)
    call = BlockCall((), {})
    assert find_streams(block, ["1"], call, torch.randn(2, 3, 4)) == {}


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_hidden_states_drift_less(family, monkeypatch):
    """Measured on tokens that were not calibrated on."""
    generator = torch.Generator().manual_seed(3)
    ids, others = (torch.randint(3, 63, (64, 32), generator=generator) for _ in range(2))
    inputs, errors = {"input_ids": others, "attention_mask": torch.ones_like(others)}, []
    before = zoo.outputs(zoo.tiny_model(family), **inputs)
    for find in (lambda *_: {}, find_streams):
        monkeypatch.setattr(block_module, "find_streams", find)
        model = zoo.tiny_model(family)
        quantize_model(
            model,
            [CalibrationBatch(ids, torch.ones_like(ids))],
            AwqConfig(group_size=16),
            QuantizeOptions(),
        )
        errors.append(float((zoo.outputs(model, **inputs) - before).pow(2).mean()))
    assert errors[1] < 0.95 * errors[0], errors
