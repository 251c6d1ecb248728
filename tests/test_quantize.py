"""The pipeline: any family, any calibration, never worse than round-to-nearest, same bytes
twice."""

import pytest
import torch
import zoo

from awq import AwqConfig, QuantizeOptions, load_calibration, quantize_model
from awq.calibration import CalibrationBatch
from awq.checkpoint import load_model, save_checkpoint
from awq.errors import ModelError
from awq.folds.find import find_folds
from awq.models.base import BaseAWQForCausalLM
from awq.nn.linear import WQLinear
from awq.nn.surgery import is_linear

CONFIG = AwqConfig(group_size=16)


def batches(rows=8, length=16, seed=3):
    ids = torch.randint(3, 63, (rows, length), generator=torch.Generator().manual_seed(seed))
    return [CalibrationBatch(ids, torch.ones_like(ids))]


def quantized(family="llama", config=CONFIG, calibration=None, **options):
    model = zoo.tiny_model(family)
    return model, quantize_model(
        model, calibration or batches(), config, QuantizeOptions(**options)
    )


class _OwnProduct(torch.nn.Linear):
    """As falcon's: a linear that spells its product out."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class _Router(torch.nn.Linear):
    """As llama4's and phimoe's: a linear by class that gives its choice."""

    def forward(self, x):
        logits = super().forward(x)
        return logits.topk(1).values, logits


class _GatedMLP(torch.nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp, self.router = mlp, _Router(32, 16)

    def forward(self, x):
        return self.mlp(x) * self.router(x)[0]


def test_subclasses_of_linear_are_taken_for_what_they_do():
    for device in ("cpu", "meta"):
        assert is_linear(_OwnProduct(8, 4).to(device)) and not is_linear(_Router(8, 4).to(device))
    model = zoo.tiny_model("llama")
    for layer in model.model.layers:
        own = _OwnProduct(48, 32, bias=False)
        own.weight = layer.mlp.down_proj.weight
        layer.mlp.down_proj = own
        layer.mlp = _GatedMLP(layer.mlp)
    report = quantize_model(model, batches(), CONFIG, QuantizeOptions())
    assert report.skipped["model.layers.0.mlp.router"] == "_Router does more than a linear"
    assert "model.layers.0.mlp.mlp.down_proj" in {line.name for line in report.linears}
    assert all(line.loss <= line.loss_rtn * 1.001 for line in report.linears)


class _Reader(torch.nn.Module):
    """As mamba's mixer: computes with a linear's weight instead of calling it. And asks another one
    for its dtype, as T5 does."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp, self.dt_proj = mlp, torch.nn.Linear(32, 32, bias=False)

    def forward(self, x):
        return self.mlp(x.to(self.mlp.down_proj.weight.dtype)) + x @ self.dt_proj.weight.t()


def test_weights_that_are_read_stay():
    model = zoo.tiny_model("llama")
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.mlp = _Reader(layer.mlp)
    kinds = {name: type(module) for name, module in model.named_modules()}
    inputs = zoo.token_batch(seed=9)
    before = zoo.outputs(model, **inputs)
    report = quantize_model(model, batches(), CONFIG, QuantizeOptions())
    assert report.skipped["model.layers.1.mlp.dt_proj"] == "its weight is read past its forward"
    chosen = {line.name for line in report.linears}
    assert len(chosen) == 21 and "model.layers.1.mlp.mlp.down_proj" in chosen
    assert all(
        type(m) is kinds[name] and not m._forward_hooks
        for name, m in model.named_modules()
        if name not in chosen
    )
    error = (zoo.outputs(model, **inputs) - before).norm() / before.norm()
    assert 0 < float(error) < 0.3
    weight = model.model.layers[1].mlp.mlp.down_proj.weight
    assert (
        isinstance(weight, torch.Tensor)
        and weight.dtype == torch.float32
        and weight.shape == (32, 48)
    )
    for use in (
        lambda: torch.cat([weight, weight]),
        lambda: weight + 1,
        lambda: torch.zeros(1, 48) @ weight.t(),
    ):
        with pytest.raises(ModelError, match="packed linear"):
            use()
    assert model.bfloat16().model.layers[1].mlp.mlp.down_proj.weight.dtype == torch.bfloat16


def test_blocks_of_torch_itself():
    """nn.TransformerEncoderLayer hands its weights to one operator, or calls its linears where that
    will not do."""
    torch.manual_seed(0)
    model = _Torch().eval()
    ids = torch.randint(3, 63, (8, 16))
    with torch.no_grad():
        before = model(ids)
        report = quantize_model(
            model, [CalibrationBatch(ids, torch.ones_like(ids))], CONFIG, QuantizeOptions()
        )
        error = (model(ids) - before).norm() / before.norm()
    assert {line.name.rpartition(".")[2] for line in report.linears} == {"linear1", "linear2"}
    assert report.skipped["layers.0.self_attn.out_proj"] == "its weight is read past its forward"
    assert 0 < float(error) < 0.3


class _Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(64, 32)
        self.layers = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True) for _ in range(3)
        )

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


class _Small(torch.nn.Module):
    """As gemma3n's blocks: a linear of very few channels beside the large ones."""

    def __init__(self, mlp, width=4):
        super().__init__()
        self.mlp, self.coefficients = mlp, torch.nn.Linear(width, width, bias=False)

    def forward(self, x):
        width = self.coefficients.in_features
        return self.mlp(x) + torch.nn.functional.pad(
            self.coefficients(x[..., :width]), (0, 32 - width)
        )


def test_small_linears_that_the_group_size_does_not_divide_stay():
    model = zoo.tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = _Small(layer.mlp)
    report = quantize_model(model, batches(), CONFIG, QuantizeOptions())
    assert (
        report.skipped["model.layers.2.mlp.coefficients"]
        == "the group size does not divide its in_features"
    )
    assert len(report.linears) == 21
    model = zoo.tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = _Small(layer.mlp, 24)
    report = quantize_model(model, batches(), CONFIG, QuantizeOptions(preset="fast"))
    assert len(report.linears) == 21
    assert any(
        "coefficients: in_features 24 is not a multiple" in warning for warning in report.warnings
    )
    model = zoo.tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = _Small(layer.mlp, 24)
    advised = CONFIG.with_(modules_to_not_convert=("coefficients",))
    assert len(quantize_model(model, batches(), advised, QuantizeOptions()).linears) == 21


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_t5_encoder(kind, tmp_path):
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    settings = dict(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_heads=4,
        feed_forward_proj=kind,
    )
    model = T5EncoderModel(T5Config(**settings)).eval()
    inputs = zoo.token_batch(seed=9)
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        report = quantize_model(model, batches(), CONFIG, QuantizeOptions())
        after = model(**inputs).last_hidden_state
        save_checkpoint(model, tmp_path / "q", CONFIG, report)
        loaded = load_model(tmp_path / "q", kind=T5EncoderModel, dtype=torch.float32)
        torch.testing.assert_close(loaded(**inputs).last_hidden_state, after, atol=1e-5, rtol=1e-5)
    assert len(report.linears) == (21 if "gated" in kind else 18)
    half = T5EncoderModel(T5Config(**settings)).eval().bfloat16()
    quantize_model(half, batches(), CONFIG, QuantizeOptions())
    assert {half.get_submodule(line.name).weight.dtype for line in report.linears} == {
        torch.bfloat16
    }
    assert 0 < float((after - before).norm() / before.norm()) < 0.2


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_quantizes_and_loss_is_below_rtn(family):
    if not zoo.available(family):
        pytest.skip(f"transformers has no {family}")
    model, report = quantized(family)
    reference = zoo.tiny_model(family)
    assert report.linears and all(r.loss <= r.loss_rtn * 1.001 for r in report.linears)
    inputs = zoo.token_batch(seed=9)
    a, b = zoo.outputs(reference, **inputs), zoo.outputs(model, **inputs)
    assert (
        b.isfinite().all()
        and torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.9
    )


@pytest.mark.parametrize(
    "options", [{"preset": "fast"}, {"duo_scaling": False}, {"clip": False}, {"scaling": False}]
)
def test_options(options):
    _, report = quantized(**options)
    assert report.loss < report.loss_rtn


def test_the_callers_random_numbers_go_on():
    """Neither quantizing nor looking for folds touches torch's global random state."""
    model = zoo.tiny_model("llama")
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    assert list(find_folds(model))
    quantize_model(model, batches(), CONFIG, QuantizeOptions())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_deterministic():
    first, second = quantized()[0].state_dict(), quantized()[0].state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_grouped_query_attention_scales_o_proj():
    _, report = quantized("llama")
    line = next(r for r in report.linears if r.name.endswith("self_attn.o_proj"))
    assert line.producer == "self_attn.v_proj"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_their_dtype(dtype):
    model = zoo.tiny_model("llama").to(dtype)
    quantize_model(model, batches(), CONFIG)
    assert model.dtype == dtype
    linear = model.model.layers[0].mlp.up_proj
    assert isinstance(linear, WQLinear) and linear.scales.dtype == torch.float16
    assert zoo.outputs(model, **zoo.token_batch()).isfinite().all()


def test_padding_never_enters_a_statistic():
    ids = torch.randint(3, 63, (4, 10), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.zeros(4, 6, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones(4, 10), torch.zeros(4, 6)], 1).long()
    _, plain = quantized("bert", calibration=[CalibrationBatch(ids, torch.ones_like(ids))])
    _, with_pad = quantized("bert", calibration=[CalibrationBatch(padded, mask)])
    assert [(r.kind, r.ratio) for r in plain.linears] == [
        (r.kind, r.ratio) for r in with_pad.linears
    ]
    assert plain.tokens == with_pad.tokens == 40
    assert [r.loss for r in plain.linears] == pytest.approx(
        [r.loss for r in with_pad.linears], rel=1e-2
    )


def test_group_size_minus_one_and_odd_outputs():
    model, report = quantized(config=AwqConfig(group_size=-1))
    assert model.model.layers[0].mlp.down_proj.group_size == 48 and report.loss < 1


def test_a_width_that_no_group_size_divides_stops_no_model():
    """40 inputs: no usual group size fits, so those linears stay dense and the rest is packed."""
    model = zoo.build("llama", zoo.DECODERS["llama"] | {"intermediate_size": 40})
    batch = zoo.token_batch()
    report = quantize_model(
        model, [CalibrationBatch(batch["input_ids"], batch["attention_mask"])], CONFIG
    )
    dense = [name for name in report.skipped if name.endswith("down_proj")]
    assert len(dense) == len(model.model.layers)
    assert len(report.linears) == 6 * len(model.model.layers)
    assert any("stay dense" in warning and "down_proj" in warning for warning in report.warnings)


def test_dead_channels_and_one_token():
    model = zoo.tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[3] = 0
    model.model.layers[1].self_attn.o_proj.weight.data[:, 5] = 0
    one = torch.tensor([[7]])
    report = quantize_model(model, [CalibrationBatch(one, torch.ones_like(one))], CONFIG)
    assert all(r.loss == r.loss for r in report.linears)
    assert zoo.outputs(model, **zoo.token_batch()).isfinite().all()


def test_non_finite_activations_do_not_end_the_run():
    model = zoo.tiny_model("llama")
    model.model.embed_tokens.weight.data[5] = float("inf")
    ids = batches()[0].input_ids.clone()
    ids[0, 0] = 5
    report = quantize_model(model, [CalibrationBatch(ids, torch.ones_like(ids))], CONFIG)
    assert any("non-finite" in w for w in report.warnings)
    assert all(r.loss == r.loss for r in report.linears)


@pytest.mark.parametrize("rounding", ["nearest", "feedback"])
def test_activations_whose_squares_overflow_do_not_end_the_run(rounding):
    """A norm's weight times 1e19 and its consumers' by 1e-19: what the model says is finite, the
    squares inside are not."""
    model = zoo.tiny_model("llama")
    block = model.model.layers[1]
    block.post_attention_layernorm.weight.data *= 1e19
    for linear in (block.mlp.gate_proj, block.mlp.up_proj):
        linear.weight.data *= 1e-19
    report = quantize_model(
        model, batches(), CONFIG, QuantizeOptions(rounding=rounding, correction=0.0)
    )
    assert any("outsized" in w for w in report.warnings)
    assert all(r.loss == r.loss for r in report.linears)


def test_a_model_whose_tokens_are_all_infinite_is_refused():
    model = zoo.tiny_model("llama")
    hook = model.model.embed_tokens.register_forward_hook(lambda _module, _args, y: y * torch.inf)
    with pytest.raises(ModelError, match="no calibration token has finite activations"):
        quantize_model(model, batches(), CONFIG)
    hook.remove()


def test_modules_to_not_convert_matches_whole_name_parts():
    model, report = quantized(
        config=AwqConfig(group_size=16, modules_to_not_convert=("layers.1", "mlp.gate"))
    )
    assert isinstance(model.model.layers[0].mlp.gate_proj, WQLinear)
    assert not isinstance(model.model.layers[1].mlp.gate_proj, WQLinear)
    assert "model.layers.1.mlp.up_proj" in report.skipped and "lm_head" in report.skipped


def test_export_compatible_keeps_dense_linears_with_quantized_values():
    dense, _ = quantized(export_compatible=True)
    packed, _ = quantized()
    a, b = dense.model.layers[0].mlp.up_proj, packed.model.layers[0].mlp.up_proj
    assert isinstance(a, torch.nn.Linear)
    torch.testing.assert_close(a.weight.data, b.dequantize())


def test_report_is_json(tmp_path):
    import json

    _, report = quantized()
    report.save(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["linears"][0]["loss_rtn"] > 0


def test_biases_take_the_mean_of_the_error():
    """On the calibration tokens the output of a linear with a bias keeps its mean; linears without
    one have none after."""
    from awq.backends import use_backend
    from awq.nn.surgery import named_linears
    from awq.quantize.statistics import MaskHolder, collect_inputs

    ids = zoo.token_batch(rows=16, length=24)["input_ids"]
    batch = [CalibrationBatch(ids, torch.ones_like(ids))]
    # further inputs change with these
    names = [f"attention.self.{n}" for n in ("query", "key", "value")]
    reports = {}
    for corrected in (True, False):
        model = zoo.tiny_model("bert")
        block = model.encoder.layer[0]
        dense = {
            n: (m.weight.detach().clone(), m.bias.detach().clone())
            for n, m in named_linears(block).items()
        }
        options = QuantizeOptions(scaling=False, bias_correction=corrected)
        reports[corrected] = quantize_model(model, batch, CONFIG, options)
        with (
            collect_inputs(block, names, MaskHolder()) as statistics,
            torch.no_grad(),
            use_backend("reference"),
        ):
            model(ids)
        for name in names:
            linear, mean = block.get_submodule(name), statistics[name].mean
            drift = (
                linear.dequantize().float() @ mean
                + linear.bias
                - dense[name][0] @ mean
                - dense[name][1]
            )
            assert (drift.abs().max() < 2e-6) == corrected, name
            assert torch.equal(linear.bias, dense[name][1]) != corrected
    assert reports[True].loss < reports[False].loss
    model = zoo.tiny_model("llama")
    quantize_model(model, batch, CONFIG)
    assert all(m.bias is None for m in model.modules() if isinstance(m, WQLinear))


def test_general_texts_join_texts_that_calibrate_error_feedback(tokenizer, texts, tmp_path):
    """As many rows as the caller's; never beside token ids, a dataset's name, nearest rounding, or
    when not wanted."""
    (tmp_path / "texts.txt").write_text("\n\n".join(texts), encoding="utf-8")
    ids = [tokenizer(text)["input_ids"] for text in texts]

    def tokens(data, **settings) -> int:
        model = BaseAWQForCausalLM(zoo.tiny_model("llama"), "")
        given = {
            "calib_data": data,
            "max_calib_samples": 8,
            "max_calib_seq_len": 16,
            "quant_config": {"q_group_size": 16},
        }
        return model.quantize(tokenizer, **given | settings).tokens

    own = tokens(texts, general_texts=False)
    assert own == 8 * 16 and tokens(texts) == tokens(str(tmp_path / "texts.txt")) == 2 * own
    assert tokens(texts, preset="fast") == own and tokens("pileval") == own
    assert tokens(ids) == tokens(ids, general_texts=False)


def test_calibration_kinds(tokenizer, texts, tmp_path, caplog):
    long = " ".join(texts)
    whole = load_calibration(texts, tokenizer, max_length=16)
    assert all(b.attention_mask.all() and b.input_ids.shape[1] == 16 for b in whole)
    cut = load_calibration([long], tokenizer, max_length=16, max_samples=1000)
    assert sum(b.input_ids.numel() for b in cut) > 500, "long samples are cut, not dropped"
    assert "longer than" not in caplog.text
    rows = load_calibration(texts, tokenizer, mode="rows", max_length=20)
    assert sum(len(b.input_ids) for b in rows) >= len(texts) and any(
        not b.attention_mask.all() for b in rows
    )
    for data in (
        [[4, 5, 6], [7, 8]],
        torch.randint(4, 60, (3, 9)),
        [torch.tensor([4, 5]), torch.tensor([[6, 7, 8]])],
    ):
        assert load_calibration(data, mode="rows")
    (tmp_path / "t.jsonl").write_text("\n".join('{"text": "the cat runs"}' for _ in range(4)))
    (tmp_path / "t.csv").write_text("text\nthe cat runs\na dog sleeps\n")
    (tmp_path / "t.txt").write_text("the cat\n\na dog")
    for name in ("t.jsonl", "t.csv", "t.txt"):
        assert load_calibration(str(tmp_path / name), tokenizer, mode="rows")
    assert load_calibration(None, tokenizer) and "bundled" in caplog.text
