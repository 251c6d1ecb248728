"""Codes that aim at the original model's outputs: what is gathered, what is solved, and that it
helps."""

import pytest
import torch
import zoo

from awq import AwqConfig, QuantizeOptions, quantize_model
from awq.calibration import CalibrationBatch
from awq.core.rounding import feedback_factor
from awq.errors import ConfigError
from awq.nn.block_calls import BlockCall
from awq.nn.hidden import HiddenStates
from awq.nn.hooks import input_of
from awq.nn.walk import BlockInputs, BlockVisit
from awq.quantize.gather import input_error, once_per_token
from awq.quantize.input_error import InputErrorStatistics, OriginalInputs, corrected
from awq.quantize.statistics import InputStatistics


def pairs(rows=400, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    original = (
        torch.randn(4, rows // 4, width, generator=generator)
        @ torch.randn(width, width, generator=generator)
        + 1
    )
    return original + 0.2 * torch.randn(original.shape, generator=generator) + 0.1 * original.roll(
        1, -1
    ), original


def test_full_correction_is_the_least_squares_solution():
    now, original = pairs()
    found = InputErrorStatistics(24, torch.device("cpu"))
    found.add_pair(now, original, None)
    weight = torch.randn(10, 24, generator=torch.Generator().manual_seed(1))
    order, factor = feedback_factor(found.gram, 1e-7)
    x, wanted = now.flatten(0, 1).double(), original.flatten(0, 1).double() @ weight.double().t()
    best = torch.linalg.lstsq(x, wanted).solution.t()
    full, mean = found.lack(weight, 1.0, centred=False)
    torch.testing.assert_close(
        corrected(weight, full, order, factor).double(), best, atol=1e-3, rtol=1e-3
    )
    torch.testing.assert_close(
        mean.double(), (wanted - x @ weight.double().t()).mean(0), atol=1e-3, rtol=1e-3
    )
    half = corrected(weight, found.lack(weight, 0.5, centred=False)[0], order, factor)
    torch.testing.assert_close(half.double(), (weight.double() + best) / 2, atol=1e-3, rtol=1e-3)


def test_what_a_stream_lacks_joins_the_target():
    """Full correction is the least-squares solution for W X + R, and with a bias for both parts
    less their means."""
    now, original = pairs()
    generator = torch.Generator().manual_seed(2)
    missing = 0.3 * now[..., :10] + torch.randn(4, 100, 10, generator=generator) + 2
    weight = torch.randn(10, 24, generator=generator)
    found = InputErrorStatistics(24, torch.device("cpu"), 10)
    found.add_pair(now, original, None, missing)
    x = now.flatten(0, 1).double()
    wanted = original.flatten(0, 1).double() @ weight.double().t() + missing.flatten(0, 1).double()
    centred_x, centred_wanted = x - x.mean(0), wanted - wanted.mean(0)
    for centred, gram, inputs, outputs in (
        (False, found.gram, x, wanted),
        (True, found.centred_gram, centred_x, centred_wanted),
    ):
        lack, mean = found.lack(weight, 1.0, centred)
        best = torch.linalg.lstsq(inputs, outputs).solution.t()
        aimed = corrected(weight, lack, *feedback_factor(gram, 1e-7))
        torch.testing.assert_close(aimed.double(), best, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(
            mean.double(), (wanted - x @ weight.double().t()).mean(0), atol=1e-3, rtol=1e-3
        )


def test_sums_leave_out_padding_and_what_is_not_finite():
    now, original = pairs()
    mask = torch.ones(4, 100, dtype=torch.bool)
    mask[1, 60:] = False
    original[2, 5, 3] = float("inf")
    now[1, 80] = float("nan")  # in the padding: not counted at all
    found = InputErrorStatistics(24, torch.device("cpu"))
    found.add_pair(now, original, mask)
    keep = mask.clone()
    keep[2, 5] = False
    x, moved = now[keep].double(), (original - now)[keep].double()
    assert (found.tokens, found.dropped) == (359, 1)
    torch.testing.assert_close(found.error.double(), moved.t() @ x, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.error_mean.double(), moved.mean(0), atol=1e-5, rtol=1e-4)
    centred = (moved - moved.mean(0)).t() @ (x - x.mean(0))
    torch.testing.assert_close(found.centred_error.double(), centred, atol=1e-2, rtol=1e-3)


def test_a_weight_counts_tokens_several_times():
    now, original = pairs()
    once, thrice = (InputErrorStatistics(24, torch.device("cpu"), 24) for _ in range(2))
    for _ in range(3):
        once.add_pair(now, original, None, original)
    thrice.add_pair(now, original, None, original, weight=3.0)
    plain, weighted = (InputStatistics(24, torch.device("cpu")) for _ in range(2))
    for _ in range(3):
        plain.add(now, None)
    weighted.add(now, None, 3.0)
    names = ("gram", "sum", "error", "error_sum", "stream", "stream_sum")
    sums = [(getattr(once, name), getattr(thrice, name)) for name in names]
    sums += [(getattr(plain, name), getattr(weighted, name)) for name in (*names[:2], "abs_sum")]
    for expected, found in sums:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)


def test_a_forward_stops_at_the_linear():
    calls = []
    block = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4), torch.nn.Linear(4, 4)
    )
    block[3].register_forward_pre_hook(lambda *_: calls.append(1))
    hidden = torch.randn(2, 3, 4)
    found = input_of(block, "2", lambda: block(hidden))
    torch.testing.assert_close(found, block[:2](hidden))
    assert not calls and not block[2]._forward_pre_hooks
    block(hidden)
    assert calls
    assert input_of(block, "3", lambda: block[:2](hidden)) is None, "it is not called"


def test_a_linear_that_sees_other_rows_is_left_alone():
    """An expert, or a linear that is called twice: its inputs in the two models cannot be
    paired."""
    block, hidden, cpu = (
        torch.nn.Sequential(torch.nn.Linear(4, 4)),
        [torch.randn(2, 3, 4)],
        torch.device("cpu"),
    )
    call = BlockCall((), {})
    inputs = BlockInputs([[call]], HiddenStates(hidden, cpu), [None], [None])
    visit = BlockVisit("", block, 0, cpu, {}, [], [], inputs)
    statistics = InputStatistics(4, cpu)
    statistics.add(hidden[0][:1], None)
    assert not once_per_token(statistics, visit)
    statistics.add(hidden[0][1:], None)
    assert not once_per_token(statistics, visit)
    once = InputStatistics(4, cpu)
    once.add(hidden[0], None)
    assert once_per_token(once, visit)
    assert input_error(block, "0", OriginalInputs(block, [], [call], inputs.hidden), visit) is None
    found = input_error(block, "0", OriginalInputs(block, ["0"], [call], inputs.hidden), visit)
    assert found is not None and found.tokens == 6 and not found.error.any()


def test_original_inputs_are_the_same_kept_or_computed_again(monkeypatch):
    block = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    hidden = HiddenStates([torch.randn(2, 3, 4), torch.randn(1, 5, 4)], torch.device("cpu"))
    calls = [BlockCall((), {})] * 2
    kept = OriginalInputs(block, ["0", "2"], calls, hidden, {1})
    monkeypatch.setattr("awq.quantize.input_error.MAX_KEPT_VALUES", 0)
    again = OriginalInputs(block, ["0", "2"], calls, hidden, {1})
    assert kept.are_kept and not again.are_kept and not block[0]._forward_pre_hooks
    for name in ("0", "2"):
        assert torch.equal(kept.of([name], 0)[name], again.of([name], 0)[name])
    assert all(torch.equal(a, b) for a, b in zip(kept.outputs(), again.outputs()))


@pytest.mark.parametrize("most", [0, 1 << 20])
def test_original_inputs_outlive_the_original_weights(most, monkeypatch):
    """Kept or computed again: the block's own weights change while it is quantized."""
    monkeypatch.setattr("awq.quantize.input_error.MAX_KEPT_VALUES", most)
    block = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    hidden = HiddenStates([torch.randn(2, 3, 4)], torch.device("cpu"))
    with torch.no_grad():
        between, output = block[:2](hidden[0]), block(hidden[0])
        found = OriginalInputs(block, ["2"], [BlockCall((), {})], hidden)
        block[0].weight.zero_()
        assert torch.equal(found.of(["2"], 0)["2"], between)
        assert torch.equal(next(found.outputs()), output)


def test_inputs_that_a_block_overwrites_are_computed_again():
    class Overwrites(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(4, 4)

        def forward(self, x):
            x = x + 0
            y = self.first(x)
            return y + x.mul_(2)

    hidden = HiddenStates([torch.randn(2, 3, 4)], torch.device("cpu"))
    with torch.no_grad():
        found = OriginalInputs(Overwrites(), ["first"], [BlockCall((), {})], hidden, ())
        assert not found.are_kept and torch.equal(found.of(["first"], 0)["first"], hidden[0])


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_outputs_come_nearer_to_the_original(family):
    ids = torch.randint(3, 63, (64, 32), generator=torch.Generator().manual_seed(3))
    batches, errors = [CalibrationBatch(ids, torch.ones_like(ids))], []
    before = zoo.outputs(zoo.tiny_model(family), input_ids=ids, attention_mask=torch.ones_like(ids))
    for share in (0.0, 0.5, 1.0):
        model = zoo.tiny_model(family)
        quantize_model(model, batches, AwqConfig(group_size=16), QuantizeOptions(correction=share))
        after = zoo.outputs(model, input_ids=ids, attention_mask=torch.ones_like(ids))
        errors.append(float((after - before).pow(2).mean()))
    assert errors[1] < 0.95 * errors[0] and errors[2] < errors[0], errors


def test_share_is_checked():
    with pytest.raises(ConfigError, match="from 0 to 1"):
        QuantizeOptions(correction=1.5)
