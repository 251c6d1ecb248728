"""Every tensor of a checkpoint is accounted for: what is missing, left over, renamed or no number
is refused by name."""

import argparse
import json
import os
import shutil

import pytest
import torch
import zoo
from conftest import make_tokenizer
from safetensors.torch import load_file, save_file
from test_loading import edit_config, packed_model, save
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
)

from awq import AutoAWQForCausalLM, Encoder
from awq.checkpoint import save_checkpoint
from awq.checkpoint.account import check_report
from awq.checkpoint.compare import compare_checkpoints
from awq.checkpoint.convert import convert_checkpoint
from awq.checkpoint.files import read_header
from awq.checkpoint.source import Source
from awq.cli import info
from awq.config import AwqConfig
from awq.errors import AwqError, CheckpointError, ModelError
from awq.nn.activation import ScaledActivation
from awq.nn.linear import WQLinear

UP = "model.layers.1.mlp.up_proj"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save(
        packed_model("llama", group_size=16),
        tmp_path_factory.mktemp("account") / "q",
        group_size=16,
    )


@pytest.fixture
def folder(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "q")


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def renamed(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


def replaced(name, value):
    def change(tensors):
        tensors[name] = value(tensors[name])

    return change


def with_nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[3] = float("nan")
    return tensor


FAULTS = {
    "norm missing": (lambda t: t.pop(NORM), "input_layernorm"),
    "norm renamed": (
        renamed(NORM, NORM.replace("input_layernorm", "input_layernorn")),
        "input_layernor",
    ),
    "embedding missing": (lambda t: t.pop("model.embed_tokens.weight"), "embed_tokens"),
    "final norm missing": (lambda t: t.pop("model.norm.weight"), "model.norm"),
    "codes renamed": (renamed(f"{UP}.qweight", f"{UP}.qweighs"), "up_proj"),
    "linear missing": (
        lambda t: [t.pop(f"{UP}.{k}") for k in ("qweight", "qzeros", "scales")],
        "up_proj",
    ),
    "surplus": (lambda t: t.update({"model.layers.0.mlp.extra.weight": torch.ones(3)}), "extra"),
    "scales of whole numbers": (replaced(f"{UP}.scales", lambda t: t.to(torch.int32)), "up_proj"),
    "codes of another dtype": (replaced(f"{UP}.qweight", lambda t: t.float()), "up_proj"),
    "scales with NaN": (replaced(f"{UP}.scales", with_nan), r"up_proj\.scales"),
    "norm with NaN": (replaced(NORM, with_nan), "input_layernorm"),
    "norm of whole numbers": (replaced(NORM, lambda t: t.to(torch.int64)), "input_layernorm"),
    "norm of another shape": (replaced(NORM, lambda t: t[:-1].clone()), "."),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_tensors_are_refused_by_name(folder, fault):
    change, name = FAULTS[fault]
    edit(folder, change)
    with pytest.raises(CheckpointError, match=name):
        AutoAWQForCausalLM.from_quantized(str(folder))


@pytest.mark.parametrize(
    "fault", ["norm missing", "norm renamed", "codes renamed", "linear missing", "scales with NaN"]
)
def test_transformers_own_door_refuses_what_packed_blocks_lack(folder, fault):
    change, name = FAULTS[fault]
    edit(folder, change)
    with pytest.raises(CheckpointError, match=name):
        AutoModelForCausalLM.from_pretrained(folder)


LOCAL_DOORS = {
    "from_quantized": lambda d: AutoAWQForCausalLM.from_quantized(d),
    "transformers": lambda d: AutoModelForCausalLM.from_pretrained(d),
    "convert": lambda d: convert_checkpoint(d, f"{d}-new", "gemm"),
    "compare": lambda d: compare_checkpoints(d, d),
    "info": lambda d: info.run(argparse.Namespace(model=d, json=True)),
}


@pytest.mark.parametrize("door", LOCAL_DOORS)
def test_zeros_without_codes_are_refused_at_every_door(folder, door):
    """Scales alone may belong to an activation; zeros belong to nothing else."""
    edit(folder, lambda tensors: tensors.pop(f"{UP}.qweight"))
    with pytest.raises(CheckpointError, match=r"up_proj.*lacks qweight"):
        LOCAL_DOORS[door](str(folder))
    assert not folder.with_name(f"{folder.name}-new").exists()


@pytest.mark.parametrize("name", [None, 5, b"x", "a\0b", "", []])
def test_names_that_no_model_can_have(name):
    for door in (AutoAWQForCausalLM.from_quantized, AutoAWQForCausalLM.from_pretrained):
        with pytest.raises(ModelError, match="name is"):
            door(name)
    with pytest.raises((CheckpointError, ModelError)):
        convert_checkpoint(name, "new", "gemm")


@pytest.mark.parametrize("more", [-1, 1])
def test_another_number_of_layers_is_refused(folder, more):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + more})
    )
    with pytest.raises(AwqError):
        AutoAWQForCausalLM.from_quantized(str(folder))


def test_packed_files_need_a_config_that_says_so(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    for door in (
        AutoAWQForCausalLM.from_pretrained,
        AutoAWQForCausalLM.from_quantized,
        Encoder.from_pretrained,
    ):
        with pytest.raises(CheckpointError, match="no quantization_config"):
            door(str(folder))


def set_config(folder, **changes):
    """Top-level keys of config.json; None takes one out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


UNREAD = {
    "silent": (None, "has no quantization_config"),
    "a server's word": ({"quant_method": "awq_marlin", "bits": 4}, "'awq_marlin'"),
    "of nobody": ({"quant_method": "int4", "bits": 4, "group_size": 16}, "'int4'"),
    "with a space": ({"quant_method": " awq", "bits": 4, "group_size": 16}, "' awq'"),
}


@pytest.mark.parametrize("files", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", UNREAD)
def test_packed_files_that_nothing_reads_are_refused_behind_transformers_own_doors(
    folder, kind, files
):
    stored, words = UNREAD[kind]
    set_config(folder, quantization_config=stored)
    if files == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    for door in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
        with pytest.raises(CheckpointError, match=rf"packed weights.*{words}"):
            door.from_pretrained(folder)


def test_transformers_still_loads_whatever_else_has_a_place_or_none(tmp_path):
    """A dense checkpoint with a method that nobody knows, and one with tensors that are left over,
    are transformers' matter."""
    zoo.tiny_model("llama").save_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.update({"model.layers.0.extra.weight": torch.ones(3)}))
    set_config(tmp_path, quantization_config={"quant_method": "of nobody"})
    found = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert "extra" in name or torch.equal(found[name], tensor)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bits_than_the_tensors_hold(folder, bits):
    edit_config(folder, bits=bits)
    with pytest.raises(AwqError, match="bits"):
        AutoAWQForCausalLM.from_quantized(str(folder))


def test_stray_shards_are_refused(folder):
    shutil.copyfile(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    names = read_header(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"00002.*stale"):
        AutoAWQForCausalLM.from_quantized(str(folder))
    index = {"weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no file of its own folder"):
        AutoAWQForCausalLM.from_quantized(str(folder))


def test_a_pipe_does_not_hang_the_reader(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    for door in (
        lambda: Source.open(folder),
        lambda: convert_checkpoint(folder, tmp_path / "other", "gemv"),
    ):
        with pytest.raises(CheckpointError, match="regular file"):
            door()


def test_activation_scales_divide_the_activation(tmp_path):
    """AutoAWQ's fold for GELU models: `mlp.act.scales` in the file, the following linear's columns
    multiplied."""
    model = packed_model("starcoder2", group_size=16)
    ids = torch.arange(3, 15).view(2, 6)
    expected = None
    generator = torch.Generator().manual_seed(0)
    for block in model.model.layers:
        block.mlp.act = ScaledActivation(
            block.mlp.act, torch.rand(block.mlp.c_proj.in_features, generator=generator) + 0.5
        )
    expected = model(ids).logits
    folder = save(model, tmp_path / "q", group_size=16)
    assert "model.layers.0.mlp.act.scales" in read_header(folder / "model.safetensors")
    loaded = AutoAWQForCausalLM.from_quantized(str(folder), fuse_layers=False, device="cpu")
    assert torch.allclose(loaded(ids).logits, expected, atol=1e-5)
    assert torch.allclose(
        AutoModelForCausalLM.from_pretrained(folder)(ids).logits, expected, atol=1e-5
    )
    convert_checkpoint(folder, tmp_path / "gemv", "gemv")
    again = AutoAWQForCausalLM.from_quantized(
        str(tmp_path / "gemv"), fuse_layers=False, device="cpu"
    )
    assert torch.allclose(again(ids).logits, expected, atol=1e-5)


def test_a_packed_head_of_a_tied_model_is_the_head(tmp_path):
    model = packed_model("llama", group_size=16, tie_word_embeddings=False)
    from awq.core.weight import round_to_nearest

    model.lm_head = WQLinear.from_quantized(round_to_nearest(model.lm_head.weight, 16))
    ids = torch.arange(3, 15).view(2, 6)
    expected = model(ids).logits
    folder = save(model, tmp_path / "q", group_size=16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    ours = AutoAWQForCausalLM.from_quantized(str(folder), device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(str(folder))
    for loaded in (ours, theirs):
        assert torch.allclose(loaded(ids).logits, expected, atol=1e-5)


def test_the_class_that_the_config_names_is_loaded(tmp_path):
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
    )
    model = BertForMaskedLM(BertConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "mlm")
    ids = torch.arange(3, 15).view(2, 6)
    loaded = AutoAWQForCausalLM.from_pretrained(str(tmp_path / "mlm"))
    assert type(loaded.model) is BertForMaskedLM
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-6)


def test_a_class_of_another_kind_of_model_is_refused(tmp_path):
    zoo.tiny_model("llama").save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(
        json.dumps(config | {"architectures": ["BertForMaskedLM"]})
    )
    with pytest.raises(AwqError, match="BertForMaskedLM"):
        AutoAWQForCausalLM.from_pretrained(str(tmp_path / "m"))


@pytest.mark.parametrize(
    "modules",
    [
        [],
        "",
        {},
        [3],
        [{"type": "x.Transformer", "path": "../other"}],
        [{"type": "x.Transformer", "path": "/etc"}],
        [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": ""}],
    ],
)
def test_modules_that_cannot_be(bert_dir, tmp_path, modules):
    folder = shutil.copytree(bert_dir, tmp_path / "m")
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["scales", "qzeros"])
def test_scaled_zeros_that_no_writer_makes(tmp_path, kind):
    """gemv_fast keeps scale times zero point: of one told as another dtype, zeros are not whole."""
    model = packed_model("llama", "gemv_fast", hidden_size=64, intermediate_size=128)
    folder = tmp_path / "q"
    save_checkpoint(model, folder, AwqConfig(group_size=32, format="gemv_fast"))
    from_quantized = AutoAWQForCausalLM.from_quantized
    from_quantized(str(folder), device="cpu", fuse_layers=False)
    edit(folder, replaced(f"{UP}.{kind}", lambda t: t.view(torch.bfloat16)))
    for door in (
        lambda: from_quantized(str(folder), device="cpu", fuse_layers=False),
        lambda: AutoModelForCausalLM.from_pretrained(folder),
        lambda: convert_checkpoint(folder, tmp_path / "r", "gemm"),
    ):
        with pytest.raises(CheckpointError, match="up_proj"):
            door()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scaled_zeros_of_any_scale_are_whole(dtype):
    from awq.formats.gemv_fast import zeros_are_whole

    generator = torch.Generator().manual_seed(0)
    zeros = torch.randint(0, 16, (64, 512), generator=generator)
    scales = (10 ** (4 * torch.rand(64, 512, generator=generator) - 4)).to(dtype)
    scales[0] = 0
    assert zeros_are_whole(scales, -(scales * zeros))
    assert zeros_are_whole(scales, -(scales.half() * zeros).half())


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_biases_of_packed_linears_are_floats(tmp_path, dtype):
    folder = tmp_path / "bert"
    save(packed_model("bert", group_size=16), folder, group_size=16)
    make_tokenizer().save_pretrained(folder)
    name = "encoder.layer.0.output.dense.bias"
    edit(folder, replaced(name, lambda t: t.to(dtype)))
    with pytest.raises(CheckpointError, match=name):
        Encoder.from_pretrained(folder)


def test_a_setting_that_is_no_number(folder, tmp_path):
    """Infinity may be meant, as Mamba's limits of a time step are; NaN is said in one line."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": float("nan")}))
    for door in (
        lambda: AutoAWQForCausalLM.from_quantized(str(folder)),
        lambda: Encoder.from_pretrained(folder),
        lambda: convert_checkpoint(folder, tmp_path / "r", "gemv"),
    ):
        with pytest.raises(AwqError, match="NaN"):
            door()


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_dtypes_are_looked_at_behind_transformers_own_door_too(folder, dtype):
    edit(folder, lambda tensors: tensors.update({NORM: tensors[NORM].to(dtype)}))
    with pytest.raises(CheckpointError, match="input_layernorm"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_dtypes_of_tensors_that_transformers_renames(tmp_path):
    """LLaVA's files name the language model otherwise than its class does today."""
    from test_kinds import vision_language

    model = vision_language("llava")
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(tmp_path)

    def change(tensors):
        name = next(name for name in tensors if name.endswith("1.input_layernorm.weight"))
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        AutoAWQForCausalLM.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("value", ["", {"a": 1}, 2.5, [], [1, "x"], True])
def test_ids_of_tokens_are_numbers(folder, value):
    """transformers takes them as they stand, and fails when it generates."""
    settings = {"eos_token_id": value, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(AwqError, match="eos_token_id|generation_config"):
        AutoAWQForCausalLM.from_quantized(str(folder))


@pytest.mark.parametrize("kind", ["t5", "mbart", "bert", "gpt2"])
def test_a_tokenizer_that_was_made_up_of_a_model_type_is_none(tmp_path, kind):
    """transformers 5 gives one for a directory without its files. Every word is unknown to it."""
    from awq.checkpoint.tokenizer import load_tokenizer

    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ModelError, match="vocabulary is missing|transformers can load"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("value", ["x", {}, -1, 0, True])
def test_a_tokenizers_longest_text_is_a_number(tmp_path, value):
    from awq.checkpoint.tokenizer import load_tokenizer

    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": value}))
    with pytest.raises(ModelError, match="model_max_length"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_its_unknown_token(tmp_path):
    """It reads the texts it knows, and would fail at the first other one."""
    from awq.checkpoint.tokenizer import load_tokenizer

    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["model"]["unk_token"] = "<nowhere>"
    path.write_text(json.dumps(definition))
    with pytest.raises(ModelError, match="cannot read text|transformers can load"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_whose_machine_code_panics(tmp_path):
    """What Rust raises then is no `Exception`."""
    from awq.checkpoint.tokenizer import load_tokenizer

    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<nowhere>", "type_id": 0}}],
        "pair": [{"SpecialToken": {"id": "<nowhere>", "type_id": 0}}],
        "special_tokens": {},
    }
    path.write_text(json.dumps(definition))
    with pytest.raises(ModelError, match="cannot read text|transformers can load"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_a_billion_ids(tmp_path):
    """Readers would make tables of that length."""
    from awq.checkpoint.tokenizer import load_tokenizer

    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    definition = json.loads(path.read_text())
    vocabulary = definition["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 10**9
    path.write_text(json.dumps(definition))
    with pytest.raises(ModelError, match="up to 1000000000"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "family, name",
    [
        ("bert", "embeddings.position_ids"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ],
)
def test_tables_that_a_model_computes_itself_are_no_surplus(family, name):
    """Files of older releases hold them; transformers 5.0 calls them unexpected."""
    model = zoo.tiny_model(family)
    check_report(model, {"unexpected_keys": [name]}, "somewhere")
    with pytest.raises(CheckpointError, match=r"no place in \w+: head\.weight"):
        check_report(model, {"unexpected_keys": [name, "head.weight"]}, "somewhere")
