"""Checkpoints in other programs' layouts: dense, and compressed-tensors as llm-compressor writes
them."""

import json
import re

import pytest
import torch
import transformers
import zoo
from packaging.version import Version
from safetensors.torch import load_file, save_file
from test_saving import packed_model
from transformers import AutoModelForCausalLM

from awq import AutoAWQForCausalLM
from awq.checkpoint import convert_checkpoint, save_checkpoint
from awq.checkpoint.compare import compare_checkpoints
from awq.cli import main
from awq.config import AwqConfig
from awq.errors import CheckpointError, ConfigError


@pytest.fixture
def packed(tmp_path):
    """A tiny Llama with random codes, and the directory where it lies as gemm."""
    model = packed_model("llama", hidden_size=64, intermediate_size=128)
    save_checkpoint(model, tmp_path / "gemm", AwqConfig(group_size=32))
    return model, tmp_path / "gemm"


def tensors_of(folder):
    return {k: t for f in sorted(folder.glob("*.safetensors")) for k, t in load_file(f).items()}


def settings_of(folder):
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


def test_dense_gives_the_values_of_the_packed_model(packed, tmp_path):
    model, folder = packed
    assert convert_checkpoint(folder, tmp_path / "dense", "dense") == 21
    assert settings_of(tmp_path / "dense") is None
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear
    inputs = zoo.token_batch()
    torch.testing.assert_close(
        zoo.outputs(dense, **inputs), zoo.outputs(model, **inputs), atol=1e-5, rtol=1e-5
    )
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "Dense weights" in card and "version `gemm`" not in card and "import awq" not in card


def test_there_and_back_is_the_same_file(packed, tmp_path):
    _, folder = packed
    convert_checkpoint(folder, tmp_path / "other", "compressed-tensors")
    assert convert_checkpoint(tmp_path / "other", tmp_path / "back", "GEMM") == 21
    one, two = tensors_of(folder), tensors_of(tmp_path / "back")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert (folder / "README.md").read_bytes() == (tmp_path / "back" / "README.md").read_bytes()
    loaded = AutoAWQForCausalLM.from_quantized(str(tmp_path / "back"), device="cpu")
    inputs = zoo.token_batch()
    ours = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(zoo.outputs(loaded, **inputs), zoo.outputs(ours, **inputs))
    assert compare_checkpoints(folder, tmp_path / "other").equal == 21


def test_sizes_that_are_no_multiples_of_eight(tmp_path):
    """Both axes are filled up to whole words."""
    from awq.checkpoint import compressed_tensors
    from awq.core.weight import round_to_nearest

    weight = round_to_nearest(torch.randn(13, 36), 12)
    save_file(compressed_tensors.pack("a.b", weight, torch.float16), tmp_path / "model.safetensors")
    from awq.checkpoint.files import tensor_headers

    headers = tensor_headers([tmp_path / "model.safetensors"])
    assert headers["a.b.weight_packed"]["shape"] == [13, 5]
    assert headers["a.b.weight_zero_point"]["shape"] == [2, 3]
    entries = compressed_tensors.linears_among(headers)["a.b"]
    found = compressed_tensors.read("a.b", entries, AwqConfig(group_size=12))
    assert all(torch.equal(x, y) for x, y in zip(found[:3], weight[:3]))


@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_the_other_program_reads_it(tmp_path, monkeypatch, model_type):
    """transformers through compressed-tensors, which knows nothing of this package."""
    pytest.importorskip(
        "compressed_tensors", reason="compressed_tensors is not installed", exc_type=ImportError
    )
    if Version(transformers.__version__) < Version("5.17"):  # 4.57 and 5.0 were tried
        pytest.skip("transformers has no reader of this compressed-tensors' files")

    model = packed_model(model_type, hidden_size=64, intermediate_size=128)
    save_checkpoint(model, tmp_path / "gemm", AwqConfig(group_size=32))
    (tmp_path / "other").mkdir()
    convert_checkpoint(tmp_path / "gemm", tmp_path / "other/gemm", "compressed-tensors")
    card = (tmp_path / "other/gemm/README.md").read_text()
    [block] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path / "other")
    names = {}
    exec(compile(block, "README.md", "exec"), names)  # as a reader of the card would load it
    loaded = names["model"]
    inputs = zoo.token_batch()
    torch.testing.assert_close(
        zoo.outputs(loaded, **inputs), zoo.outputs(model, **inputs), atol=1e-5, rtol=1e-5
    )


def test_files_without_zero_points_are_symmetric(packed, tmp_path):
    """llm-compressor leaves zeros out where all of them are in the middle."""
    _, folder = packed
    convert_checkpoint(folder, tmp_path / "other", "compressed-tensors")
    file = tmp_path / "other" / "model.safetensors"
    tensors = {k: t for k, t in load_file(file).items() if not k.endswith("zero_point")}
    save_file(tensors, file, metadata={"format": "pt"})
    convert_checkpoint(tmp_path / "other", tmp_path / "dense", "dense")
    name = "model.layers.0.mlp.up_proj"
    codes = tensors[f"{name}.weight_packed"]
    low = codes[:, 0] & 15  # the first input of each output
    expected = (low - 8).float() * tensors[f"{name}.weight_scale"][:, 0].float()
    found = load_file(tmp_path / "dense" / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(found[:, 0], expected)


def break_settings(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group |= {k: v for k, v in changes.items() if k.endswith("_activations")}
    group["weights"] |= {k: v for k, v in changes.items() if not k.endswith("_activations")}
    (folder / "config.json").write_text(json.dumps(config))


def break_top(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def break_tensor(folder, kind, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.0.mlp.up_proj.{kind}"
    tensors[name] = change(tensors.pop(name)) if name in tensors else change(None)
    kept = {k: t for k, t in tensors.items() if t is not None}
    save_file(kept, file, metadata={"format": "pt"})


BROKEN = {
    "activations": (lambda f: break_settings(f, input_activations={"num_bits": 8}), "activations"),
    "output": (lambda f: break_settings(f, output_activations={"num_bits": 8}), "activations"),
    "names that are none": (lambda f: break_top(f, ignore=[5]), "ignore is"),
    "one name": (lambda f: break_top(f, ignore="lm_head"), "ignore is"),
    "sparse": (
        lambda f: break_top(f, sparsity_config={"format": "sparse-24-bitmask"}),
        "neither sparse nor turned",
    ),
    "turned": (
        lambda f: break_top(f, transform_config={"config_groups": {"u": {"type": "hadamard"}}}),
        "neither sparse nor turned",
    ),
    "eight bits": (lambda f: break_settings(f, num_bits=8), "8 bits"),
    "blocks": (lambda f: break_settings(f, strategy="block"), "strategy 'block'"),
    "group size": (lambda f: break_settings(f, group_size=16), "weight_scale has shape"),
    "no scale": (lambda f: break_tensor(f, "weight_scale", lambda t: None), "lacks weight_scale"),
    "not finite": (lambda f: break_tensor(f, "weight_scale", lambda t: t * torch.nan), "float16"),
    "own order": (
        lambda f: break_tensor(f, "weight_g_idx", lambda t: torch.zeros(64, dtype=torch.int32)),
        "weight_g_idx",
    ),
    "shape": (
        lambda f: break_tensor(f, "weight_shape", lambda t: torch.tensor([-1, 64])),
        "weight_shape",
    ),
    "cut": (lambda f: break_tensor(f, "weight_packed", lambda t: t[:5].clone()), "weight_packed"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_awq_cannot_hold_is_refused_with_names(packed, tmp_path, kind):
    _, folder = packed
    change, message = BROKEN[kind]
    convert_checkpoint(folder, tmp_path / "other", "compressed-tensors")
    change(tmp_path / "other")
    with pytest.raises((CheckpointError, ConfigError), match=message):
        convert_checkpoint(tmp_path / "other", tmp_path / "back", "gemm")
    assert not (tmp_path / "back").exists()


def test_large_weights_become_shards(packed, tmp_path, monkeypatch):
    from awq.checkpoint import convert
    from awq.checkpoint.shards import ShardWriter

    model, folder = packed
    monkeypatch.setattr(convert, "ShardWriter", lambda place: ShardWriter(place, limit=40_000))
    convert_checkpoint(folder, tmp_path / "dense", "dense")
    shards = sorted((tmp_path / "dense").glob("*.safetensors"))
    assert len(shards) > 3 and all(file.stat().st_size < 60_000 for file in shards)
    index = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_of(tmp_path / "dense").keys()
    inputs = zoo.token_batch()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(
        zoo.outputs(loaded, **inputs), zoo.outputs(model, **inputs), atol=1e-5, rtol=1e-5
    )


def test_on_the_command_line(packed, tmp_path, capsys):
    _, folder = packed
    assert main(["convert", str(folder), str(tmp_path / "d"), "--version", "Dense"]) == 0
    for verb, version in (("convert", "exl2"), ("quantize", "dense")):
        with pytest.raises(SystemExit, match="2"):
            main([verb, str(folder), str(tmp_path / "x"), "--version", version])
        assert f"'{version}'" in capsys.readouterr().err
