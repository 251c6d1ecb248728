"""Laws of the arithmetic: codes stay in range, no search is worse than round-to-nearest, the Gram
loss is the output error."""

import pytest
import torch

from awq.core.ranges import block_diagonal, search_range
from awq.core.rounding import feedback_factor, round_with_feedback
from awq.core.scales import _upper_half, gram_loss, search_scale
from awq.core.weight import (
    QuantizedWeight,
    fake_quantize,
    group_range,
    quantize_nearest,
    round_to_nearest,
    scale_and_zero,
)
from awq.errors import ConfigError, ModelError


def layer(out=48, width=64, tokens=200, seed=0):
    """A weight and inputs with a few loud channels, as real activations have."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    x = (
        torch.randn(tokens, width, generator=generator)
        * torch.rand(width, generator=generator).mul(4).exp()
    )
    return weight, x


def loss_of(quantized: QuantizedWeight, weight, gram):
    return float(gram_loss(quantized.dequantize() - weight, gram))


@pytest.mark.parametrize("group_size", [16, 32, 64, -1])
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_nearest_error_is_at_most_half_a_step(group_size, zero_point, bits):
    weight, _ = layer()
    quantized = round_to_nearest(weight, group_size, bits, zero_point)
    assert int(quantized.codes.max()) < 2**bits
    size = weight.shape[1] if group_size == -1 else group_size
    assert quantized.group_size == size
    step = quantized.scales.float().repeat_interleave(size, 1)
    # The zero point is rounded too, so the end of a range can be a whole step and a half away at
    # most.
    assert ((quantized.dequantize() - weight).abs() <= 1.01 * step).all()
    inner = (quantized.codes > 0) & (quantized.codes.int() < 2**bits - 1)
    assert ((quantized.dequantize() - weight).abs() <= 0.505 * step)[inner].all()


def test_fake_quantize_is_quantize_then_dequantize():
    weight, _ = layer()
    scale, zero = scale_and_zero(*group_range(weight, 16))
    assert torch.equal(
        fake_quantize(weight, scale, zero), quantize_nearest(weight, scale, zero).dequantize()
    )


@pytest.mark.parametrize(
    "weight", [torch.zeros(4, 32), torch.full((4, 32), 0.3), torch.full((4, 32), -1e-7)]
)
def test_constant_groups_stay_finite_and_close(weight):
    back = round_to_nearest(weight, 16).dequantize()
    assert back.isfinite().all()
    assert (back - weight).abs().max() <= 0.02 * weight.abs().max() + 1e-6


def test_gram_loss_is_the_output_error():
    weight, x = layer()
    delta = torch.randn_like(weight)
    exact = (x.double() @ delta.double().t()).pow(2).sum()
    assert float(gram_loss(delta, x.t() @ x)) == pytest.approx(float(exact), rel=1e-4)


def test_block_diagonal():
    gram = torch.arange(36.0).view(6, 6)
    assert torch.equal(block_diagonal(gram, 2)[1], gram[2:4, 2:4])


def test_scale_search_never_worse_than_identity_and_finds_loud_channels():
    weight, x = layer()
    choice = search_scale(weight, x.t() @ x, x.abs().mean(0), 16)
    assert choice.loss < 0.9 * choice.identity_loss
    loud = x.abs().mean(0).argsort()
    assert choice.scale[loud[-8:]].mean() > choice.scale[loud[:8]].mean()


def test_scale_search_keeps_identity_when_no_loss_is_finite():
    weight, x = layer()
    choice = search_scale(
        weight, torch.full((x.shape[1], x.shape[1]), float("nan")), x.abs().mean(0), 16
    )
    assert choice.kind == "identity" and (choice.scale == 1).all()


def test_dead_channels_keep_scale_one():
    weight, x = layer()
    x[:, 5] = 0
    choice = search_scale(weight, x.t() @ x, x.abs().mean(0), 16)
    assert choice.scale[5] == 1 and choice.scale.isfinite().all()


@pytest.mark.parametrize("zero_point", [True, False])
def test_searched_range_never_worse_per_group(zero_point):
    weight, x = layer()
    gram, size = x.t() @ x, 16
    blocks = block_diagonal(gram, size)

    def group_losses(scale, zero):
        delta = (fake_quantize(weight, scale, zero) - weight).view(48, -1, size)
        return torch.einsum("ogi,gij,ogj->og", delta, blocks, delta)

    plain = group_losses(
        *scale_and_zero(*group_range(weight, size, zero_point), zero_point=zero_point)
    )
    found = group_losses(*search_range(weight, gram, size, zero_point=zero_point))
    assert (found <= plain * (1 + 1e-4)).all() and found.sum() < 0.95 * plain.sum()


def test_feedback_beats_nearest_on_correlated_inputs():
    weight, x = layer(tokens=400)
    x = x @ (torch.eye(64) + 0.3 * torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))
    gram = x.t() @ x
    scale, zero = scale_and_zero(*group_range(weight, 16))
    feedback = round_with_feedback(weight, *feedback_factor(gram), scale, zero)
    assert loss_of(feedback, weight, gram) < 0.7 * loss_of(
        quantize_nearest(weight, scale, zero), weight, gram
    )


@pytest.mark.parametrize("tokens", [1, 3])
def test_feedback_survives_rank_deficient_statistics(tokens):
    weight, x = layer(tokens=tokens)
    x[:, 3] = 0
    gram = x.t() @ x
    scale, zero = scale_and_zero(*group_range(weight, 16))
    assert (
        round_with_feedback(weight, *feedback_factor(gram), scale, zero)
        .dequantize()
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (0, 5)])
def test_a_matrix_that_cannot_be_factorized_is_refused(value, place):
    gram = torch.eye(16)
    gram[place] = gram[place[::-1]] = value
    with pytest.raises(ModelError, match="16 inputs cannot be factorized"):
        feedback_factor(gram)


@pytest.mark.parametrize("columns", [7, 16, 64])
def test_the_factor_is_that_of_the_inverse_whatever_its_panels(columns, monkeypatch):
    monkeypatch.setattr("awq.core.rounding.COLUMNS", columns)
    _, x = layer(tokens=400)
    x[:, 3] = 0
    gram = x.t() @ x
    order, factor = feedback_factor(gram, 0.01)
    wanted = gram.double()
    wanted.diagonal()[3] = 1.0
    wanted.diagonal().add_(0.01 * float(wanted.diagonal().mean()))
    inverse = torch.linalg.inv(wanted[order][:, order])
    assert not factor.tril(-1).any()
    torch.testing.assert_close(factor.t() @ factor, inverse.float())


@pytest.mark.parametrize("rows", [5, 64])
def test_half_of_a_gram_matrix_stands_for_all_of_it(rows, monkeypatch):
    monkeypatch.setattr("awq.core.scales._ROWS", rows)
    weight, x = layer()
    gram = x.t() @ x
    upper = _upper_half(gram).float()
    assert torch.equal(upper, (gram.triu() + gram.triu(1)).bfloat16().float())


@pytest.mark.parametrize("damping", [-1.0, 0.0, float("nan"), float("inf")])
def test_damping_is_a_number_above_zero(damping):
    with pytest.raises(ConfigError, match="damping"):
        feedback_factor(torch.eye(4), damping)


def test_feedback_without_correlation_is_nearest():
    weight, _ = layer()
    scale, zero = scale_and_zero(*group_range(weight, 16))
    gram = torch.diag(torch.rand(64) + 0.5)
    assert torch.equal(
        round_with_feedback(weight, *feedback_factor(gram), scale, zero).codes,
        quantize_nearest(weight, scale, zero).codes,
    )
