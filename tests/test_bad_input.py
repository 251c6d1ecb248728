"""Bad input ends in one clear error before work starts, and leaves nothing half-written."""

import json
import shutil
from contextlib import suppress

import pytest
import torch
import zoo
from test_kinds import vision_language
from transformers import AutoTokenizer

from awq import (
    AutoAWQForCausalLM,
    AwqConfig,
    Encoder,
    load_calibration,
    prepare_calibration_tokens,
    quantize_model,
)
from awq.checkpoint import convert_checkpoint, load_model, save_checkpoint
from awq.cli import make_parser
from awq.errors import AwqError, CalibrationError, CheckpointError, ConfigError, ModelError
from awq.evals.perplexity import perplexity


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = zoo.tiny_model("llama")
    batches = load_calibration(torch.randint(3, 60, (4, 16)))
    quantize_model(model, batches, AwqConfig(group_size=16))
    target = tmp_path_factory.mktemp("bad") / "q"
    save_checkpoint(model, target, AwqConfig(group_size=16))
    return model, target


def test_group_size_that_does_not_divide(llama_dir, tokenizer, texts):
    model = AutoAWQForCausalLM.from_pretrained(str(llama_dir))
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    with pytest.raises(
        ConfigError,
        match=r"down_proj: in_features 48 is not a multiple of group_size 32; use group_size 16",
    ):
        model.quantize(tokenizer, quant_config={"q_group_size": 32}, calib_data=texts)
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())


@pytest.mark.parametrize(
    "config, word",
    [
        ({"version": "marlin"}, "marlin"),
        ({"w_bits": 4}, "w_bits"),
        ({"w_bit": 5.5}, "5.5"),
        ({"w_bit": 3}, "4 bits"),
        ({"q_group_size": 0}, "group_size"),
        ({"w_bit": 4, "bits": 3}, "twice"),
    ],
)
def test_wrong_settings(llama_dir, tokenizer, texts, config, word):
    with pytest.raises(ConfigError, match=word):
        AutoAWQForCausalLM.from_pretrained(str(llama_dir)).quantize(
            tokenizer, quant_config={"q_group_size": 16, **config}, calib_data=texts
        )


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 8])
@pytest.mark.parametrize("export_compatible", [False, True])
def test_other_bits_are_refused_at_every_door(llama_dir, tokenizer, texts, bits, export_compatible):
    """No AWQ format holds them, so dense weights with such values are not offered either."""
    for make in (
        AwqConfig,
        lambda bits: AwqConfig.from_file({"quant_method": "awq", "bits": bits}),
    ):
        with pytest.raises(ConfigError, match="4 bits"):
            make(bits=bits)
    model = AutoAWQForCausalLM.from_pretrained(str(llama_dir))
    with pytest.raises(ConfigError, match="4 bits"):
        model.quantize(
            tokenizer,
            {"q_group_size": 16, "w_bit": bits},
            calib_data=texts,
            export_compatible=export_compatible,
        )


@pytest.mark.parametrize(
    "data", [[], [""], ["   "], [[]], torch.zeros(0, 4, dtype=torch.long), 3, [1.5], {"a": 1}]
)
def test_empty_or_strange_calibration(tokenizer, data):
    with pytest.raises(CalibrationError):
        load_calibration(data, tokenizer, mode="rows")


def test_no_texts_to_prepare(tokenizer):
    with pytest.raises(CalibrationError, match="none of the 2"):
        prepare_calibration_tokens(tokenizer, ["", " "])


def test_missing_file_and_column(tokenizer, tmp_path):
    with pytest.raises(CalibrationError, match="does not exist"):
        load_calibration(str(tmp_path / "no.jsonl"), tokenizer)
    (tmp_path / "t.csv").write_text("body\nhello\n")
    with pytest.raises(CalibrationError, match="column 'text'"):
        load_calibration(str(tmp_path / "t.csv"), tokenizer)


def test_missing_model(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        AutoAWQForCausalLM.from_pretrained(str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="config.json"):
        AutoAWQForCausalLM.from_quantized(str(tmp_path))


def test_unquantized_model_in_from_quantized(llama_dir):
    with pytest.raises(ConfigError, match="from_pretrained"):
        AutoAWQForCausalLM.from_quantized(str(llama_dir))


def test_model_without_blocks():
    with pytest.raises(ModelError, match="no list of repeated blocks"):
        quantize_model(torch.nn.Linear(8, 8), load_calibration(torch.ones(1, 4, dtype=torch.long)))


def test_out_of_disk_while_saving(saved, tmp_path, monkeypatch):
    model, _ = saved

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", no_space)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(model, tmp_path / "out", AwqConfig(group_size=16))
    assert list(tmp_path.iterdir()) == []


def test_failed_save_keeps_the_old_directory(saved, tmp_path, monkeypatch):
    model, _ = saved
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    monkeypatch.setattr(
        model,
        "save_pretrained",
        lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(CheckpointError):
        save_checkpoint(model, tmp_path / "out", AwqConfig(group_size=16))
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (
        tmp_path / "out" / "precious"
    ).exists()


def test_truncated_safetensors(saved, tmp_path):
    shutil.copytree(saved[1], tmp_path / "q")
    path = tmp_path / "q" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(tmp_path / "q")
    with pytest.raises(CheckpointError, match="truncated"):
        convert_checkpoint(tmp_path / "q", tmp_path / "r", "gemv")
    assert not (tmp_path / "r").exists()


def test_keys_of_users_are_strict_and_those_of_files_are_not(saved, tmp_path):
    with pytest.raises(ConfigError, match="group_sise"):
        AwqConfig.from_dict({"group_sise": 3})
    shutil.copytree(saved[1], tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"] |= {
        "autoround_version": "0.5.1",
        "sym": True,
        "meta": {},
        "ignore": ["lm_head"],
    }
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    ids = torch.tensor([[5, 6, 7]])
    foreign = AutoAWQForCausalLM.from_quantized(
        str(tmp_path / "q"), fuse_layers=False, device="cpu"
    )
    own = AutoAWQForCausalLM.from_quantized(str(saved[1]), fuse_layers=False, device="cpu")
    assert torch.equal(foreign(ids).logits, own(ids).logits)


def test_unknown_argument(llama_dir, texts):
    model = AutoAWQForCausalLM.from_pretrained(str(llama_dir))
    with pytest.raises(ConfigError, match="colour"):
        model.quantize(AutoTokenizer.from_pretrained(llama_dir), calib_data=texts, colour="red")


FAR_BEYOND = ["intermediate_size", "num_key_value_heads", "vocab_size", "num_labels"]


@pytest.mark.parametrize("name", [*FAR_BEYOND, "num_hidden_layers"])
def test_a_size_far_beyond_the_files(llama_dir, tmp_path, name):
    """Some releases of transformers would fill the memory first."""
    shutil.copytree(llama_dir, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: 10**9}))
    with pytest.raises((CheckpointError, ModelError)):
        AutoAWQForCausalLM.from_pretrained(str(tmp_path / "m"))


def test_a_size_far_beyond_the_dense_part_of_a_packed_checkpoint(tmp_path):
    _packed_vision_model(tmp_path, vision_config={"intermediate_size": 10**9})
    with pytest.raises(CheckpointError):
        AutoAWQForCausalLM.from_quantized(str(tmp_path), fuse_layers=False, device="cpu")


@pytest.mark.parametrize(
    ("name", "count"),
    [("num_hidden_layers", 10**5), ("num_labels", 10**7), ("num_attention_heads", 10**9)],
)
def test_counts_far_beyond_the_files_of_an_encoder(bert_dir, tmp_path, name, count):
    """transformers would build a layer for each."""
    shutil.copytree(bert_dir, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: count}))
    with pytest.raises(CheckpointError, match=name):
        Encoder.from_pretrained(str(tmp_path / "m"))


@pytest.mark.parametrize(
    "setting",
    [
        {"trained_tokens": 10**12},
        {"layer_width": 16384},
        {"label2id": {"record player": 5000}, "id2label": {"5000": "record player"}},
    ],
)
def test_a_large_number_that_counts_nothing_of_the_model(llama_dir, tmp_path, setting):
    shutil.copytree(llama_dir, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    assert AutoAWQForCausalLM.from_pretrained(str(tmp_path / "m")) is not None


def test_a_large_number_that_is_no_size_in_a_packed_checkpoint(tmp_path):
    _packed_vision_model(tmp_path, vision_config={"projection_dim": 10**9})
    model = AutoAWQForCausalLM.from_quantized(str(tmp_path), fuse_layers=False, device="cpu")
    assert torch.isfinite(model(torch.arange(4, 10).view(1, 6)).logits).all()


def _packed_vision_model(folder, vision_config):
    """A vision-language model whose language tower is packed, with other settings of its vision
    tower."""
    model = vision_language("llava")
    batches = load_calibration(torch.randint(3, 60, (4, 16)))
    quantize_model(model, batches, AwqConfig(group_size=16))
    save_checkpoint(model, folder, AwqConfig(group_size=16))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"] |= vision_config
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("value", [True, -1, [], {}, "x", [3], [None]])
def test_architectures_that_are_no_names(saved, tmp_path, value):
    shutil.copytree(saved[1], tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": value}))
    arguments = make_parser().parse_args(["info", str(tmp_path / "m")])
    with suppress(AwqError):
        arguments.run(arguments)  # without the command's last line of defence
    with suppress(AwqError):
        load_model(tmp_path / "m")


def test_settings_that_only_the_models_own_code_refuses(llama_dir, tmp_path):
    shutil.copytree(llama_dir, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 2.5}))
    model = load_model(tmp_path / "m").train()
    with pytest.raises(ModelError, match="own code of LlamaForCausalLM fails.*config.json"):
        perplexity(model, torch.arange(3, 19))
