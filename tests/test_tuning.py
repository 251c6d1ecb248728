"""End-to-end tuning of scales: nothing but scales moves, held-out loss falls, the same bytes
twice."""

import pytest
import torch
import zoo

from awq import AwqConfig, QuantizeOptions, quantize_model
from awq.calibration import CalibrationBatch
from awq.nn.linear import WQLinear
from awq.quantize import pipeline, tuning
from awq.quantize.run import QuantizeRun


def batches(rows=32, length=16):
    ids = torch.randint(3, 63, (rows, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[::3, length // 2 :] = 0
    return [CalibrationBatch(ids[i : i + 4], mask[i : i + 4]) for i in range(0, rows, 4)]


def quantized(family, **options):
    model = zoo.tiny_model(family)
    return model, quantize_model(
        model, batches(), AwqConfig(group_size=16), QuantizeOptions(**{"preset": "best"} | options)
    )


@pytest.mark.parametrize("family,kind", [("llama", "kl"), ("gemma2", "kl"), ("bert", "mse")])
def test_only_scales_change_and_held_out_loss_falls(family, kind, monkeypatch):
    given = {}

    def watched(model, weights, *args):
        given.update(weights)
        return tuning.tune_scales(model, weights, *args)

    monkeypatch.setattr(pipeline, "tune_scales", watched)
    model, report = quantized(family, tuning=6)
    assert (
        report.tuning["kind"] == kind and report.tuning["loss_after"] < report.tuning["loss_before"]
    )
    assert given.keys() == {line.name for line in report.linears}
    plain = zoo.tiny_model(family).state_dict()
    for name, before in given.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, WQLinear)
        after = linear.quantized()
        assert torch.equal(after.codes.cpu(), before.codes.cpu()) and torch.equal(
            after.zeros.cpu(), before.zeros.cpu()
        )
        assert not torch.equal(after.scales.cpu(), before.scales.cpu())
    ends = [name for name in plain if "embed" in name or "lm_head" in name]
    assert ends and all(torch.equal(model.state_dict()[name], plain[name]) for name in ends)
    assert all(p.requires_grad for p in model.parameters())


def test_an_epoch_that_gains_nothing_is_taken_back(monkeypatch):
    """At a rate that ruins every scale, the state from before is the result."""
    monkeypatch.setattr(tuning, "OF_TOKENS", tuning.Pace(10.0, 4))
    with monkeypatch.context() as patch:
        nothing = tuning.TuningReport("kl", 0, 0, 0.0, 0.0)
        patch.setattr(pipeline, "tune_scales", lambda model, weights, *args: (weights, nothing))
        before, _ = quantized("llama")
    after, report = quantized("llama", tuning=1)
    assert report.tuning["best_epoch"] == 0
    states = before.state_dict(), after.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_rates_fall_until_an_epoch_gains(monkeypatch):
    """From a rate that is far too high tuning still comes to a gain."""
    monkeypatch.setattr(tuning, "OF_TOKENS", tuning.Pace(0.3, 4))
    _, report = quantized("llama", tuning=12)
    assert report.tuning["best_epoch"] > 1
    assert report.tuning["loss_after"] < report.tuning["loss_before"]


@pytest.mark.gpu
def test_a_model_on_the_cpu_is_tuned_on_the_gpu():
    model, report = quantized("bert", tuning=1)
    assert report.tuning["epochs"] == 1 and {
        t.device.type for t in model.state_dict().values()
    } == {"cpu"}


def test_same_bytes_twice():
    first, second = quantized("llama")[0].state_dict(), quantized("llama")[0].state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_blocks_take_large_batches_and_the_correction_no_row_that_judges():
    """Small batches are for steps of training; what judges them was never corrected for."""
    rows = torch.arange(3, 3 + 48).view(48, 1).expand(48, 512).contiguous()
    given = [CalibrationBatch(rows, torch.ones_like(rows))]
    # a GPU takes larger batches, of as many tokens as its memory allows
    options = QuantizeOptions(preset="best", device="cpu")
    model = zoo.tiny_model("llama").eval()
    run = QuantizeRun.start(model, given, AwqConfig(group_size=16), options)
    small = [set(batch.input_ids[:, 0].tolist()) for batch in run.tuning_batches]
    large = [set(batch.input_ids[:, 0].tolist()) for batch in run.batches]
    assert len(small) == 12 and len(large) == 7
    judging = set.union(*(small[i] for i in tuning.held_out(len(small))))
    assert judging == set.union(*(large[i] for i in run.judges))
    training = set.union(*(ids for i, ids in enumerate(large) if i not in run.judges))
    assert training | judging == set(range(3, 51)) and not training & judging


def test_dense_export_gets_the_tuned_values():
    packed, _ = quantized("llama")
    dense, report = quantized("llama", export_compatible=True)
    for line in report.linears:
        expected = packed.get_submodule(line.name).dequantize()
        assert torch.allclose(dense.get_submodule(line.name).weight, expected, atol=1e-6)


def test_float16_model_on_a_cpu_keeps_its_dtypes():
    model = zoo.tiny_model("llama").half()
    dtypes = {k: v.dtype for k, v in model.named_parameters() if "proj" not in k}
    report = quantize_model(
        model, batches(), AwqConfig(group_size=16), QuantizeOptions(preset="best")
    )
    assert report.tuning["loss_after"] <= report.tuning["loss_before"]
    assert {k: v.dtype for k, v in model.named_parameters()} == dtypes


def test_few_tokens_are_enough():
    ids = torch.tensor([[5, 9, 7]])
    model = zoo.tiny_model("llama")
    calibration = [CalibrationBatch(ids, torch.ones_like(ids))]
    report = quantize_model(
        model, calibration, AwqConfig(group_size=16), QuantizeOptions(preset="best")
    )
    assert report.tuning["loss_after"] <= report.tuning["loss_before"]
