"""End-to-end tuning: what may not move stays, held-out loss falls, the same bytes twice."""

import pytest
import torch
import zoo

from awq import AwqConfig, QuantizeOptions, quantize_model
from awq.calibration import CalibrationBatch
from awq.core.weight import round_to_nearest
from awq.nn.linear import WQLinear
from awq.quantize import match, pipeline, tuning
from awq.quantize.run import QuantizeRun
from awq.quantize.tuned import TunedLinear, packed_lean


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
def test_zeros_and_ends_stay_and_held_out_loss_falls(family, kind, monkeypatch):
    given = {}

    def watched(model, weights, *args):
        given.update(weights)
        return tuning.tune_weights(model, weights, *args)

    monkeypatch.setattr(pipeline, "tune_weights", watched)
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
        moved = (after.codes.cpu().int() - before.codes.cpu().int()).abs()
        assert float((moved > 0).float().mean()) < 0.1  # of an encoder none: its codes stay
        assert kind == "kl" or not moved.any()
        assert torch.equal(after.zeros.cpu(), before.zeros.cpu())
        assert not torch.equal(after.scales.cpu(), before.scales.cpu())
    ends = [name for name in plain if "embed" in name or "lm_head" in name]
    assert ends and all(torch.equal(model.state_dict()[name], plain[name]) for name in ends)
    assert all(p.requires_grad for p in model.parameters())


def test_an_epoch_that_gains_nothing_is_taken_back(monkeypatch):
    """At a rate that ruins every scale, the state from before is the result."""
    monkeypatch.setattr(tuning, "OF_TOKENS", tuning.Pace(10.0, 10.0, 10.0, 256))
    with monkeypatch.context() as patch:
        nothing = tuning.TuningReport("kl", 0, 0, 0.0, 0.0)
        patch.setattr(pipeline, "tune_weights", lambda model, weights, *args: (weights, nothing))
        before, _ = quantized("llama")
    after, report = quantized("llama", tuning=1)
    assert report.tuning["best_epoch"] == 0
    states = before.state_dict(), after.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_rates_fall_until_an_epoch_gains(monkeypatch):
    """From a rate that is far too high tuning still comes to a gain."""
    monkeypatch.setattr(tuning, "OF_TOKENS", tuning.Pace(0.3, 0.3, 0.0, 256))
    _, report = quantized("llama", tuning=12)
    assert report.tuning["best_epoch"] > 1
    assert report.tuning["loss_after"] < report.tuning["loss_before"]


def leaning_linear():
    """(weight, lean in steps, linear in training)"""
    generator = torch.Generator().manual_seed(0)
    weight = round_to_nearest(torch.randn(8, 32, generator=generator), 16)
    lean = torch.rand(8, 32, generator=generator) - 0.5
    linear = TunedLinear(weight, None, torch.device("cpu"), torch.float32, packed_lean(lean))
    return weight, lean, linear


def test_nothing_moves_untrained():
    weight, _, linear = leaning_linear()
    assert torch.equal(linear.weight, weight.dequantize())
    assert all(torch.equal(a, b) for a, b in zip(linear.result()[:3], weight[:3]))


def test_codes_that_lean_move_first():
    """A gradient that pushes all places up by a tenth of a step moves codes that lean up by more
    than 0.4, where there is a higher one."""
    weight, lean, linear = leaning_linear()
    linear.weight.grad = -torch.ones_like(linear.weight)
    linear.pass_on()
    with torch.no_grad():
        linear.place -= 0.1 * linear.place.grad.sign()
    linear.write()

    after = linear.result()
    moved = after.codes.int() - weight.codes.int()
    assert torch.equal(moved == 1, (lean > 0.4) & (weight.codes < 15))
    assert int((moved == 1).sum()) > 10 and not (moved < 0).any()
    assert torch.equal(linear.weight, after.dequantize())


def test_gradients_of_scales_and_places_are_those_of_the_weight():
    weight, _, linear = leaning_linear()
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    linear(x).pow(2).sum().backward()
    linear.pass_on()

    change = torch.zeros_like(linear.change, requires_grad=True)
    steps = weight.steps().float().view(8, 2, 16)
    dense = (steps * (weight.scales.float() * (1 + change)).unsqueeze(-1)).view(8, 32)
    dense.retain_grad()
    (x @ dense.t()).pow(2).sum().backward()
    assert torch.allclose(linear.change.grad, change.grad, rtol=1e-4)
    by_scale = dense.grad.view(8, 2, 16) * weight.scales.float().unsqueeze(-1)
    assert torch.allclose(linear.place.grad, by_scale.view(8, 32), rtol=1e-4)


def test_norms_are_tuned_for_next_tokens():
    plain, (model, report) = zoo.tiny_model("llama").state_dict(), quantized("llama", tuning=4)
    assert report.tuning["best_epoch"] > 0
    norm = "model.norm.weight"
    assert not torch.equal(model.state_dict()[norm], plain[norm])
    assert torch.allclose(model.state_dict()[norm], plain[norm], rtol=0.05)


def test_retold_rows_keep_their_beginning_and_padding():
    batch = batches()[0]
    logits = torch.full((*batch.input_ids.shape, 64), -30.0)
    logits[..., 63] = 30.0  # the model would always write 63
    generator = torch.Generator().manual_seed(0)
    ids = match.retold(batch, logits, 0.3, generator)
    changed = ids != batch.input_ids
    assert (ids[changed] == 63).all()
    assert not changed[:, 0].any() and not changed[batch.attention_mask == 0].any()
    assert 0.1 < float(changed[batch.attention_mask == 1].float().mean()) < 0.5


@pytest.mark.gpu
def test_a_model_on_the_cpu_is_tuned_on_the_gpu():
    model, report = quantized("bert", tuning=1)
    assert report.tuning["epochs"] == 1 and {
        t.device.type for t in model.state_dict().values()
    } == {"cpu"}


def test_log_lines_say_how_long_targets_and_tuning_will_take(caplog):
    caplog.set_level("INFO", "awq.quantize")
    quantized("llama", tuning=2)
    lines = [line for line in caplog.messages if " left" in line]
    # few tokens are one batch, and it is retold for both epochs
    assert any(line.startswith("targets batch 3 of 3 done, 0:") for line in lines)
    assert any(line.startswith("tuning step ") and "kl 0.0" in line for line in lines)


def test_settings_of_torch_come_back():
    settings = torch.utils.deterministic
    assert settings.fill_uninitialized_memory
    quantized("llama", tuning=1)
    assert settings.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()


def test_same_bytes_twice():
    first, second = quantized("llama")[0].state_dict(), quantized("llama")[0].state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.gpu
def test_same_bytes_twice_on_a_gpu():
    found = []
    for _ in range(2):
        model = zoo.tiny_model("llama").cuda()
        quantize_model(model, batches(), AwqConfig(group_size=16), QuantizeOptions(preset="best"))
        found.append(model.state_dict())
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


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
    judging = set.union(*(small[i] for i in match.held_out(len(small))))
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
