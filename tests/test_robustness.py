"""Odd models, odd data, every bit width: a valid result no worse than round-to-nearest, and a
warning where data were too few."""

import pytest
import torch
import zoo

from awq import AwqConfig, QuantizeOptions, quantize_model
from awq.calibration import CalibrationBatch
from awq.core.weight import round_to_nearest
from awq.models.base import BaseAWQForCausalLM

NEAREST = {"preset": "fast", "scaling": False, "clip": False, "bias_correction": False}


def calibration(rows: int, length: int, low: int = 3, high: int = 63) -> list[CalibrationBatch]:
    ids = torch.randint(low, high, (rows, length), generator=torch.Generator().manual_seed(3))
    return [CalibrationBatch(ids, torch.ones_like(ids))]


def output_error(
    family: str, batches: list[CalibrationBatch], change=lambda model: None, **options
) -> tuple[float, list[str]]:
    """Relative squared error of the outputs on other tokens, and the warnings."""
    before, model = zoo.tiny_model(family), zoo.tiny_model(family)
    change(before)
    change(model)
    report = quantize_model(model, batches, AwqConfig(group_size=16), QuantizeOptions(**options))
    inputs = zoo.token_batch(rows=16, length=24, seed=9)
    expected, found = (zoo.outputs(m, **inputs).float() for m in (before, model))
    assert found.isfinite().all()
    # weights that codes hold exactly lose nothing but what they aim at beyond themselves
    for line in report.linears:
        assert line.loss <= line.loss_rtn * 1.001 or (
            line.loss_rtn < 1e-6 and report.options["correction"]
        ), line
    return float((found - expected).pow(2).sum() / expected.pow(2).sum()), report.warnings


@pytest.mark.parametrize("preset", ["fast", "balanced"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "bert", "gpt2"])
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_few_tokens_do_no_harm(family, preset, tokens):
    """Without care, one token makes tiny models 10 to 900 times as wrong as nearest codes do."""
    nearest, _ = output_error(family, calibration(1, tokens), **NEAREST)
    error, warnings = output_error(family, calibration(1, tokens), preset=preset)
    # tiny models: two roundings that are equally good differ by a third
    assert error < 1.35 * nearest
    assert any(f"{tokens} calibration tokens are few" in w for w in warnings)


@pytest.mark.parametrize("family", ["llama", "qwen2", "bert", "gpt2"])
def test_texts_of_another_kind(family):
    """Calibrated on one half of the vocabulary, measured on all of it."""
    nearest, _ = output_error(family, calibration(32, 16, 3, 33), **NEAREST)
    error, warnings = output_error(family, calibration(32, 16, 3, 33))
    assert error < nearest and not warnings


def massive(model: torch.nn.Module) -> None:
    """One channel of the residual stream a thousand times as loud as the others, as large models
    have."""
    model.model.embed_tokens.weight.data[:, 7] *= 1000
    model.model.layers[0].input_layernorm.weight.data[7] = 50


def constant(model: torch.nn.Module) -> None:
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    model.model.layers[1].self_attn.o_proj.weight.data.fill_(0.25)
    model.model.layers[2].mlp.down_proj.weight.data[::2] = -1e-7


@pytest.mark.parametrize("change", [massive, constant])
@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_odd_models(change, preset):
    nearest, _ = output_error("llama", calibration(32, 16), change, **NEAREST)
    error, _ = output_error("llama", calibration(32, 16), change, preset=preset)
    assert error < 1.1 * nearest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_activations_beyond_float16(dtype):
    """Products that overflow float16 in the model are finite while it is quantized, in float32."""

    def loud(model: torch.nn.Module) -> None:
        model.model.layers[0].mlp.up_proj.weight.data *= 3000
        model.to(dtype)

    def error(**options) -> float:
        before, model = zoo.tiny_model("llama"), zoo.tiny_model("llama")
        loud(before)
        loud(model)
        report = quantize_model(
            model, calibration(32, 16), AwqConfig(group_size=16), QuantizeOptions(**options)
        )
        assert not report.warnings
        state = model.state_dict().values()
        assert all(t.isfinite().all() for t in state if t.is_floating_point())
        inputs = zoo.token_batch(rows=16, length=24, seed=9)
        expected, found = (zoo.outputs(m.float(), **inputs) for m in (before, model))
        return float((found - expected).pow(2).sum() / expected.pow(2).sum())

    # Later linears whisper beside the first one's output, and what they aim at is mostly what the
    # stream lacks of it. So the outputs are compared, not every linear with its own weight.
    assert error() < 0.5 * error(**NEAREST)


@pytest.mark.parametrize("preset", ["fast", "balanced", "best"])
def test_every_preset_on_a_model_whose_head_reads_more_than_hidden_states(preset):
    nearest, _ = output_error("gpt2", calibration(32, 16), **NEAREST)
    assert output_error("gpt2", calibration(32, 16), preset=preset)[0] < nearest


@pytest.mark.parametrize("group_size", [-1, 16, 32, 64, 128])
def test_every_group_size_as_dense_weights(group_size):
    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    model = zoo.build("llama", sizes)
    config = AwqConfig(group_size=group_size)
    report = quantize_model(
        model, calibration(32, 32), config, QuantizeOptions(export_compatible=True)
    )
    assert report.loss < report.loss_rtn
    weight = model.model.layers[0].mlp.down_proj.weight.data
    groups = weight.view(len(weight), -1, weight.shape[1] if group_size == -1 else group_size)
    assert max(len(row.unique()) for row in groups[::16].flatten(0, 1)) <= 16
    nearest = round_to_nearest(weight, group_size).dequantize()
    assert weight.isfinite().all() and nearest.shape == weight.shape


@pytest.mark.parametrize("family", ["llama", "gpt2", "mpt", "opt", "roberta"])
def test_rows_are_no_longer_than_the_model_reads(family):
    """Families name the number of their positions differently; these have 64."""
    wrapper = BaseAWQForCausalLM(zoo.tiny_model(family), "tiny")
    if family in ("gpt2", "mpt"):  # the zoo sets this for all of them
        vars(wrapper.config).pop("max_position_embeddings", None)
    ids = torch.randint(3, 63, (300,), generator=torch.Generator().manual_seed(3)).tolist()
    wrapper.quantize(quant_config={"q_group_size": 16}, calib_data=[ids], preset="fast")
    assert wrapper.report.tokens >= 62
