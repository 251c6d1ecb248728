"""What a live model knows of itself: quantized, half quantized, fused or not; and what each kind of
model can do."""

import copy
import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from awq import (
    AutoAWQForCausalLM,
    AutoAWQForEmbedding,
    AwqConfig,
    QuantizeOptions,
    load_calibration,
    quantize_model,
)
from awq.checkpoint import save_checkpoint
from awq.errors import CalibrationError, CheckpointError, ConfigError, ModelError
from awq.models import AwqEmbeddingModel, AwqModel, BaseAWQForCausalLM
from awq.quantize import progress

CONFIG = {"q_group_size": 16}
IDS = torch.arange(4, 16).view(2, 6)


def quantized(folder, texts, **options):
    model = AutoAWQForCausalLM.from_pretrained(str(folder))
    model.quantize(
        calib_data=texts,
        **{"quant_config": CONFIG, "preset": "fast", "general_texts": False} | options,
    )
    return model


def test_a_model_quantized_in_memory_is_saved_by_transformers(llama_dir, texts, tmp_path):
    model = quantized(llama_dir, texts)
    live = model(IDS).logits
    model.save_pretrained(tmp_path / "x")
    settings = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "awq" and settings["modules_to_not_convert"] == ["lm_head"]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "x")(IDS).logits, live)


def test_a_dense_export_is_not_marked_and_pack_marks_it(llama_dir, texts, tmp_path):
    model = quantized(llama_dir, texts, export_compatible=True)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    model.pack()
    model.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "given", [["mlp.down_proj"], ["down_proj"], "down_proj", ["model.layers.0"]]
)
def test_what_is_excluded_stays_dense(llama_dir, texts, given):
    model = quantized(llama_dir, texts, quant_config=CONFIG | {"modules_to_not_convert": given})
    name = given if isinstance(given, str) else given[0]
    lines = [line.name for line in model.report.linears]
    assert lines and not any(f".{name}." in f".{line}." for line in lines)


@pytest.mark.parametrize(
    "given", [["re:.*down_proj"], ["*.down_proj"], ["down_porj"], ["model.layers.0.mlp."]]
)
def test_an_exclusion_that_excludes_nothing_is_an_error_with_near_names(llama_dir, texts, given):
    with pytest.raises(ConfigError, match="is no module of the model.*(down_proj|mlp)"):
        quantized(llama_dir, texts, quant_config=CONFIG | {"modules_to_not_convert": given})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_before_work(llama_dir, texts, value):
    model = AutoAWQForCausalLM.from_pretrained(str(llama_dir))
    weight = model.model.model.layers[0].mlp.up_proj.weight
    weight.data[3, 5] = value
    before = weight.clone()
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        model.quantize(calib_data=texts, quant_config=CONFIG)
    assert torch.equal(weight.nan_to_num(), before.nan_to_num())


class Interruption(logging.Handler):
    """Ctrl-C at the moment when so many blocks are done."""

    def __init__(self, blocks):
        super().__init__(logging.INFO)
        self.left = blocks

    def emit(self, record):
        self.left -= record.getMessage().startswith("block ")
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("door", ["wrapper", "function"])
def test_an_interrupted_model_says_so(llama_dir, texts, tmp_path, door, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)  # a line after every block
    model = AutoAWQForCausalLM.from_pretrained(str(llama_dir))
    logger, handler = logging.getLogger("awq.quantize"), Interruption(blocks=2)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    batches, config = (
        load_calibration(texts, model.tokenizer, max_length=32),
        AwqConfig(group_size=16),
    )
    try:
        with pytest.raises(KeyboardInterrupt):
            model.quantize(
                calib_data=texts, quant_config=CONFIG
            ) if door == "wrapper" else quantize_model(model.model, batches, config)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    for use in (
        lambda: model.quantize(calib_data=texts),
        lambda: model.save_quantized(tmp_path / "q"),
        lambda: model.generate(IDS),
        lambda: quantize_model(model.model, batches, config),
        lambda: save_checkpoint(model.model, tmp_path / "q", config),
        lambda: copy.deepcopy(model).generate(IDS),
    ):
        with pytest.raises(ModelError, match="interrupted"):
            use()
    assert not (tmp_path / "q").exists()


def test_bad_input_leaves_the_model_whole(llama_dir, texts):
    model = AutoAWQForCausalLM.from_pretrained(str(llama_dir))
    before = model(IDS).logits
    with pytest.raises(CalibrationError):
        quantize_model(model.model, [], AwqConfig(group_size=16))
    assert torch.equal(model(IDS).logits, before)
    model.quantize(calib_data=texts, quant_config=CONFIG, preset="fast", general_texts=False)
    assert model.is_quantized


ODD_OPTIONS = {
    "refinement": [-1, True, 1.5, "2", 10**9],
    "tuning": [-1, "x"],
    "correction": [-0.1, 1.1, float("nan"), "a", True],
    "seed": [None, "a", -1, 2.5, 2**63],
    "scaling": [None, 1, "yes"],
    "clip": [0],
    "progress": ["no", 1],
    "device": ["xyz", 5, "cuda:99"],
    "preset": [None, "slow", []],
    "rounding": ["down", 0],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in ODD_OPTIONS.items() for value in values]
)
def test_options_are_typed_and_ranged(name, value):
    with pytest.raises(ConfigError, match=name) as refused:
        QuantizeOptions(**{name: value})
    assert "\n" not in str(refused.value)


def test_messages_are_one_line_that_does_nothing_to_a_terminal():
    shown = str(CheckpointError("tensor \x1b[2J\u202e\n  of\x00 größe " + "x" * 10_000))
    assert (
        shown.isprintable()
        and len(shown) < 2100
        and shown.startswith(r"tensor \x1b[2J\u202e of\x00 größe")
    )


def test_an_encoder_is_no_causal_language_model(bert_dir):
    model = AutoAWQForEmbedding.from_pretrained(str(bert_dir))
    assert type(model) is AwqEmbeddingModel and isinstance(model, AwqModel)
    assert not isinstance(model, BaseAWQForCausalLM)
    assert not {"generate", "fuse_layers", "fuse"} & set(dir(AwqEmbeddingModel))


def test_old_argument_names(llama_dir, texts, tmp_path):
    quantized(llama_dir, texts).save_quantized(tmp_path / "q")
    loaded = AutoAWQForCausalLM.from_quantized(
        str(tmp_path / "q"), max_new_tokens=24, safetensors=True, batch_size=1
    )
    assert loaded.generate(IDS[:1], max_new_tokens=4).shape == (1, 10)
    with pytest.raises(ConfigError, match="max_seq_len"):
        loaded.generate(IDS[:1], max_new_tokens=30)
