"""Save then load gives equal outputs, by every door and in every version."""

import json
import subprocess
import sys

import pytest
import torch
import zoo
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from awq import AutoAWQForCausalLM, AutoAWQForEmbedding, prepare_calibration_tokens
from awq.checkpoint import convert_checkpoint
from awq.nn.linear import WQLinear
from awq.utils.utils import get_best_device

QUANT = {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}


@pytest.fixture(scope="module")
def llama(llama_dir, texts, tmp_path_factory):
    """(quantized model in memory, its directory), made as the guide makes it."""
    target = tmp_path_factory.mktemp("q") / "llama-awq"
    model = AutoAWQForCausalLM.from_pretrained(str(llama_dir))
    tokenizer = AutoTokenizer.from_pretrained(llama_dir, trust_remote_code=True)
    model.quantize(tokenizer, quant_config=QUANT, calib_data=texts)
    model.save_quantized(str(target))
    tokenizer.save_pretrained(str(target))
    return model.model, target


@pytest.fixture(scope="module")
def bert(bert_dir, texts, tmp_path_factory):
    target = tmp_path_factory.mktemp("q") / "bert-awq"
    model = AutoAWQForCausalLM.from_pretrained(str(bert_dir))
    tokenizer = AutoTokenizer.from_pretrained(bert_dir)
    model.quantize(prepare_calibration_tokens(tokenizer, texts), quant_config=QUANT)
    model.save_quantized(str(target))
    return model.model, target


def test_directory_is_complete(llama):
    _, target = llama
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert (
        config["quant_method"] == "awq"
        and config["bits"] == 4
        and config["modules_to_not_convert"] == ["lm_head"]
    )
    for name in ("tokenizer.json", "README.md", "quantization_report.json", "model.safetensors"):
        assert (target / name).exists()
    assert not [p for p in target.parent.iterdir() if p.name.startswith(".")], (
        "temporary directories remain"
    )


def test_our_door(llama):
    model, target = llama
    loaded = AutoAWQForCausalLM.from_quantized(
        str(target), fuse_layers=True, max_seq_len=64, batch_size=2, device=get_best_device()
    )
    inputs = zoo.token_batch()
    zoo.assert_same_outputs(loaded, model, **inputs)
    assert loaded.tokenizer is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transformers_door_keeps_dtype_and_integers(llama, dtype):
    model, target = llama
    loaded = AutoModelForCausalLM.from_pretrained(target, torch_dtype=dtype)
    mine, theirs = model.model.layers[1].mlp.down_proj, loaded.model.layers[1].mlp.down_proj
    assert loaded.dtype == dtype and isinstance(theirs, WQLinear)
    # in the file's layout, wherever the linear has computed
    kept, found = mine.state_dict(), theirs.state_dict()
    assert all(torch.equal(kept[k].cpu(), found[k]) for k in ("qweight", "qzeros", "scales"))
    out = zoo.outputs(loaded, **zoo.token_batch())
    reference = zoo.outputs(model, **zoo.token_batch())
    assert (out.float() - reference).norm() / reference.norm() < {torch.float32: 1e-6}.get(
        dtype, 0.05
    )


def test_body_of_a_language_model(llama):
    model, target = llama
    inputs = zoo.token_batch()
    body = AutoModel.from_pretrained(target)
    with torch.no_grad():
        torch.testing.assert_close(
            body(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state
        )


def test_pipeline_and_device_map(llama):
    _, target = llama
    text = pipeline("text-generation", model=str(target), device_map="cpu")(
        "the cat", max_new_tokens=4
    )[0]["generated_text"]
    assert text.startswith("the cat")


def test_encoder_doors(bert):
    model, target = bert
    inputs = zoo.token_batch()
    inputs["attention_mask"][0, 6:] = 0
    reference = zoo.outputs(model, **inputs)
    for loaded in (
        AutoModel.from_pretrained(target),
        AutoAWQForCausalLM.from_quantized(str(target), device="cpu"),
        AutoAWQForEmbedding.from_quantized(str(target), device="cpu"),
    ):
        assert torch.equal(zoo.outputs(loaded, **inputs), reference)
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == ["pooler.dense"]


def test_conversion_between_versions(bert, tmp_path):
    """Through gemv and back is the same file content; the converted model loads by our door."""
    from safetensors.torch import load_file

    _, target = bert
    count = convert_checkpoint(target, tmp_path / "other", "GEMV")
    assert count == 18
    convert_checkpoint(tmp_path / "other", tmp_path / "back", "gemm")
    a, b = (
        load_file(target / "model.safetensors"),
        load_file(tmp_path / "back" / "model.safetensors"),
    )
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    loaded = AutoAWQForCausalLM.from_quantized(str(tmp_path / "other"), device="cpu")
    inputs = zoo.token_batch()
    assert torch.equal(
        zoo.outputs(loaded, **inputs), zoo.outputs(AutoModel.from_pretrained(target), **inputs)
    )


def test_save_pretrained_of_a_loaded_model(llama, tmp_path):
    _, target = llama
    AutoModelForCausalLM.from_pretrained(target).save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert isinstance(again.model.layers[0].mlp.up_proj, WQLinear)


def test_generation_with_streamer_and_total_length(llama):
    from transformers import TextStreamer

    class Counter(TextStreamer):
        pieces = 0

        def put(self, value):
            Counter.pieces += 1

        def end(self):
            pass

    _, target = llama
    model = AutoAWQForCausalLM.from_quantized(str(target), fuse_layers=True)
    tokens = model.tokenizer("the cat runs", return_tensors="pt").input_ids
    out = model.generate(tokens, streamer=Counter(model.tokenizer), max_seq_len=12, eos_token_id=-1)
    assert out.shape[1] == 12 and Counter.pieces == 12 - tokens.shape[1] + 1


def test_import_is_light():
    code = (
        "import awq, sys; assert not {'torch', 'transformers'} & set(sys.modules); "
        "print(awq.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_register_and_unregister():
    from transformers.quantizers import auto

    import awq

    awq.register()
    ours = auto.AUTO_QUANTIZER_MAPPING["awq"]
    awq.unregister()
    try:
        assert auto.AUTO_QUANTIZER_MAPPING["awq"].__module__.startswith("transformers.")
    finally:
        awq.register()
    assert auto.AUTO_QUANTIZER_MAPPING["awq"] is ours
