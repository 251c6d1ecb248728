"""Loading: exact integers in every dtype and version, prefixes of either kind, one clear error for
a broken checkpoint."""

import json
import struct

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import awq
from awq import AutoAWQForCausalLM, AwqConfig
from awq.checkpoint import convert_checkpoint, load_model, save_checkpoint
from awq.checkpoint.hf import AwqHfQuantizer, storage_settings
from awq.core.weight import round_to_nearest
from awq.errors import AwqError, CheckpointError, ConfigError, ModelError
from awq.nn.linear import WQLinear
from awq.nn.surgery import get_weight, named_linears, replace_module

FORMATS = ["gemm", "gemv", "gemv_fast"]
WIDE = dict(hidden_size=64, intermediate_size=128)


def packed_model(family="llama", format="gemm", group_size=32, **changes):
    """A tiny model whose block linears are rounded to nearest and packed; no search."""
    model = zoo.tiny_model(family) if not changes else wide_model(family, **changes)
    for name, module in named_linears(model).items():
        if "lm_head" not in name and "pooler" not in name:
            weight = round_to_nearest(get_weight(module), group_size)
            replace_module(
                model, name, WQLinear.from_quantized(weight, getattr(module, "bias", None), format)
            )
    return model


def wide_model(family, **changes):
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        family, **{**zoo.TINY, **WIDE, "num_key_value_heads": 2, **changes}
    )
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if family in zoo.DECODERS else AutoModel
    return auto.from_config(config).float().eval()


def save(model, folder, **settings):
    save_checkpoint(model, folder, AwqConfig(**{"group_size": 32, **settings}))
    return folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """(model in memory, its directory): large enough for every format."""
    model = packed_model("llama", **WIDE)
    return model, save(model, tmp_path_factory.mktemp("wide") / "q")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_exact_in_every_dtype_and_format(wide, format, dtype, tmp_path):
    """transformers 4 casts every float of a checkpoint to the model's dtype: bfloat16 scales lost
    three bits there."""
    model, folder = wide
    if format != "gemm":
        convert_checkpoint(folder, tmp_path / "q", format)
        folder = tmp_path / "q"
    loaded = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=dtype)
    assert (
        loaded.dtype == dtype
        and loaded.hf_quantizer.is_compileable
        and loaded.hf_quantizer.is_trainable
    )
    found = {n: m for n, m in loaded.named_modules() if isinstance(m, WQLinear)}
    assert len(found) == 21
    for name, module in found.items():
        assert module.format == format and module.scales.dtype == torch.float16
        assert torch.equal(module.dequantize(), model.get_submodule(name).dequantize())
    if dtype == torch.float32:
        inputs = zoo.token_batch()
        torch.testing.assert_close(
            zoo.outputs(loaded, **inputs), zoo.outputs(model, **inputs), atol=1e-6, rtol=1e-6
        )


def test_body_and_head_load_each_other(wide, tmp_path):
    model, folder = wide
    inputs = zoo.token_batch()
    body = AutoModel.from_pretrained(folder)
    hidden = zoo.outputs(model.model, **inputs)
    assert torch.equal(zoo.outputs(body, **inputs), hidden)
    save(body, tmp_path / "body")
    names = load_file(tmp_path / "body" / "model.safetensors")
    assert "layers.0.mlp.up_proj.qweight" in names, "an AutoModel saves without a prefix"
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    assert torch.equal(zoo.outputs(whole.model, **inputs), hidden)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "opt"])
def test_tied_heads_and_transposed_linears(family, tmp_path):
    """GPT-2's Conv1D is packed too; a tied head is stored once and tied again after loading."""
    model = packed_model(family, group_size=16)
    folder = save(model, tmp_path / "q", group_size=16)
    inputs = zoo.token_batch()
    loaded = AutoAWQForCausalLM.from_quantized(
        str(folder), device="cpu", attn_implementation="eager"
    )
    assert torch.equal(zoo.outputs(loaded, **inputs), zoo.outputs(model, **inputs))
    if getattr(model.config, "tie_word_embeddings", False) and family in zoo.DECODERS:
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_tied_word_embeddings_stored_once(tmp_path):
    model = packed_model("llama", tie_word_embeddings=True, **WIDE)
    folder = save(model, tmp_path / "q")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    inputs = zoo.token_batch()
    assert torch.equal(zoo.outputs(loaded, **inputs), zoo.outputs(model, **inputs))


def test_modules_come_from_the_files_not_from_the_list(wide, tmp_path):
    """A wrong or empty modules_to_not_convert does no harm: names of tensors decide."""
    model, folder = wide
    convert_checkpoint(folder, tmp_path / "q", "gemv")
    edit_config(tmp_path / "q", modules_to_not_convert=["mlp"])
    inputs = zoo.token_batch()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert torch.equal(zoo.outputs(loaded, **inputs), zoo.outputs(model, **inputs))


@pytest.mark.parametrize("device_map", ["auto", "balanced", "cpu", {"": "cpu"}])
def test_device_maps(wide, device_map):
    model, folder = wide
    loaded = load_model(folder, device_map=device_map)
    zoo.assert_same_outputs(loaded, model, **zoo.token_batch())


def test_configs_of_other_writers():
    """AutoAWQ's own keys, transformers 4's dump with kernel names, and config objects."""
    from transformers import AwqConfig as TheirConfig

    expected = AwqConfig(group_size=64)
    autoawq = {
        "quant_method": "awq",
        "zero_point": True,
        "group_size": 64,
        "bits": 4,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    dump = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "version": "ipex",
        "zero_point": True,
        "backend": "autoawq",
        "do_fuse": False,
        "exllama_config": None,
        "fuse_max_seq_len": None,
        "modules_to_fuse": None,
    }
    assert storage_settings(autoawq) == storage_settings(dump) == expected
    assert storage_settings(TheirConfig(bits=4, group_size=64, zero_point=True)) == expected
    assert AwqHfQuantizer({**autoawq, "version": "GEMVFast"}).settings == expected.with_(
        format="gemv_fast"
    )


@pytest.mark.parametrize("method", ["AWQ", "Awq"])
def test_the_method_in_any_case(wide, copy, method):
    """transformers would go on with random numbers for a method that it does not know."""
    edit_config(copy, quant_method=method)
    ids = zoo.token_batch(2, 6)["input_ids"]
    for door in (AutoModelForCausalLM.from_pretrained, load_model):
        with torch.no_grad():
            assert torch.equal(door(copy)(ids).logits, door(wide[1])(ids).logits)
    with pytest.raises(ConfigError, match="quantized already"):
        AutoAWQForCausalLM.from_pretrained(str(copy))


def test_dequantize(wide):
    model, folder = wide
    loaded = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    assert not any(isinstance(m, WQLinear) for m in loaded.modules())
    inputs = zoo.token_batch()
    torch.testing.assert_close(zoo.outputs(loaded, **inputs), zoo.outputs(model, **inputs))


def test_sentence_transformer(tmp_path):
    import sentence_transformers as library
    from conftest import make_tokenizer

    model = packed_model("bert", group_size=16)
    source = tmp_path / "source"
    make_tokenizer().save_pretrained(source)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text(
        '{"word_embedding_dimension": 32, "pooling_mode_mean_tokens": true}'
    )
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{k}"}
        for i, (p, k) in enumerate(kinds)
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    save_checkpoint(model, tmp_path / "q", AwqConfig(group_size=16), source=source)
    loaded = library.SentenceTransformer(str(tmp_path / "q"), device="cpu")
    texts = ["the cat runs", "a dog"]
    mine = make_tokenizer()(texts, padding=True, return_tensors="pt")
    inputs = {k: mine[k] for k in ("input_ids", "attention_mask")}
    mask = inputs["attention_mask"].unsqueeze(-1)
    expected = (zoo.outputs(model, **inputs) * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(
        loaded.encode(texts, convert_to_tensor=True), expected, atol=1e-5, rtol=1e-4
    )


# -- broken checkpoints
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(wide, tmp_path):
    """A checkpoint to break."""
    import shutil

    return shutil.copytree(wide[1], tmp_path / "broken")


def doors(folder):
    """Every way in, each as a function that loads."""
    return [lambda: AutoAWQForCausalLM.from_quantized(str(folder)), lambda: load_model(folder)]


def test_truncated_file(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    for door in doors(copy):
        with pytest.raises(CheckpointError, match="is truncated"):
            door()
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_model(copy)
    path.write_bytes(struct.pack("<Q", 10) + b"not json!!" + b"0" * 50)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_model(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 64}, "group_size 32"),
        ({"version": "gemv"}, "version gemm"),
        ({"version": "llama.cpp"}, "llama.cpp"),
        ({"bits": "four"}, "bits"),
        ({"quant_method": "gptq"}, "gptq"),
    ],
)
def test_wrong_settings(copy, changes, message):
    edit_config(copy, **changes)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        AutoAWQForCausalLM.from_quantized(str(copy))


def test_missing_parts(copy, tmp_path):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.up_proj: the checkpoint lacks scales"
    ):
        load_model(copy)
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "model-2.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=r"lacks model-2\.safetensors"):
        load_model(copy)
    (copy / "model.safetensors.index.json").unlink()
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no .safetensors weights"):
        load_model(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        load_model(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_model(copy)
    with pytest.raises(ModelError, match="does not exist"):
        load_model(tmp_path / "nowhere")


def test_a_checkpoint_of_another_model(copy):
    tensors = {
        name.replace("layers", "towers"): t
        for name, t in load_file(copy / "model.safetensors").items()
    }
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    renamed = {name.replace("towers.", "towers.x"): t for name, t in tensors.items()}
    save_file(renamed, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AwqError, match="belongs to LlamaForCausalLM"):
        load_model(copy)


def test_register_is_reversible():
    from transformers.quantizers import auto

    awq.register()
    awq.register()
    awq.unregister()
    try:
        for table in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
            assert table["awq"].__module__.startswith("transformers.")
        assert not hasattr(PreTrainedModel._load_pretrained_model, "before_awq")
    finally:
        awq.register()
    assert auto.AUTO_QUANTIZER_MAPPING["awq"] is AwqHfQuantizer


def test_weights_that_did_not_arrive_are_an_error(wide, monkeypatch):
    """transformers warns and goes on with random weights when it finds no place for some; packed
    ones must not be random."""
    from awq.checkpoint import hf

    def spoiled(model, matched, packed):
        next(iter(m for m in model.modules() if isinstance(m, WQLinear))).qweight.zero_()

    monkeypatch.setattr(hf, "restore_packed", spoiled)
    with pytest.raises(CheckpointError, match="did not load"):
        AutoModelForCausalLM.from_pretrained(wide[1])
