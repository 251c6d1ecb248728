"""Saving: complete or not at all, everything beside the weights carried over, nothing of the user's
lost."""

import json
import os
import stat
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file
from test_loading import packed_model, save, wide_model
from transformers import AutoModelForCausalLM

from awq import AwqConfig, QuantReport, quantize_directory
from awq.checkpoint import convert_checkpoint, load_model, save_checkpoint
from awq.checkpoint.directory import check_target, complete_directory
from awq.checkpoint.work_folder import work_folder
from awq.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def model():
    return packed_model("llama", group_size=16)


@pytest.fixture
def source(tmp_path):
    """A model directory with every kind of companion."""
    files = {
        "config.json": "{}",
        "README.md": "---\nlicense: apache-2.0\nlanguage: [en, zh]\nmetrics: x\n---\n# Original\n",
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "vocab.txt": "a",
        "preprocessor_config.json": "{}",
        "custom.py": "x = 1",
        "modules.json": '[{"path": ""}, {"path": "2_Dense"}]',
        "1_Pooling/config.json": "{}",
        "2_Dense/model.safetensors": "dense",
        "2_Dense/config.json": "{}",
        "model.safetensors": "old",
        "model-00001-of-00002.safetensors": "old",
        "pytorch_model.bin": "old",
        "model.gguf": "old",
        "model.safetensors.index.json": "{}",
        "pytorch_model.bin.index.json": "{}",
        "original/consolidated.00.pth": "old",
        "original/params.json": "{}",
        "onnx/model.onnx": "old",
        "openvino/m.bin": "old",
        ".git/HEAD": "x",
    }
    for name, text in files.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "source"


def tree(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_companions(model, source, tmp_path):
    report = QuantReport({}, {})
    save_checkpoint(model, tmp_path / "q", AwqConfig(group_size=16), report, source)
    assert tree(tmp_path / "q") == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "README.md",
        "quantization_report.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "vocab.txt",
        "preprocessor_config.json",
        "custom.py",
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "2_Dense/config.json",
        "original/params.json",
    }
    card = (tmp_path / "q" / "README.md").read_text()
    assert (
        "license: apache-2.0" in card
        and "- zh" in card
        and "metrics" not in card
        and "Original" not in card
    )
    assert "group size 16" in card and "linears quantized" in card
    assert json.loads((tmp_path / "q" / "quantization_report.json").read_text())["linears"] == []
    assert (tmp_path / "q" / "2_Dense" / "model.safetensors").read_text() == "dense"
    mode = stat.S_IMODE((tmp_path / "q" / "model.safetensors").stat().st_mode)
    assert mode == stat.S_IMODE((tmp_path / "q" / "config.json").stat().st_mode)


@pytest.mark.parametrize("heads", [True, False])
def test_companions_of_a_hub_model(model, source, tmp_path, monkeypatch, heads):
    """Dense heads of sentence-transformers come with their weights; the model's own weights are not
    fetched."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    if not heads:
        (source / "modules.json").unlink()
    cache = tmp_path / "cache"

    def snapshot_download(name, allow_patterns=None, ignore_patterns=None):
        assert name == "someone/model"
        for file in filter_repo_objects(
            sorted(tree(source)), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            (cache / file).write_bytes((source / file).read_bytes())
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    save_checkpoint(model, tmp_path / "q", AwqConfig(group_size=16), None, "someone/model")
    assert (
        (tmp_path / "q/2_Dense/model.safetensors").is_file(),
        (tmp_path / "q/1_Pooling/config.json").is_file(),
    ) == (heads, True)
    weights = {
        f for f in tree(cache) if f.endswith((".safetensors", ".bin", ".pth", ".gguf", ".onnx"))
    }
    assert weights == ({"2_Dense/model.safetensors"} if heads else set())


def test_config_names_every_dense_linear(model, tmp_path):
    settings = json.loads((save(model, tmp_path / "q", group_size=16) / "config.json").read_text())[
        "quantization_config"
    ]
    assert settings == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 16,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    assert not hasattr(model.config, "quantization_config"), "the model in memory is as it was"
    partly = wide_model("llama")
    settings = json.loads((save(partly, tmp_path / "none") / "config.json").read_text())[
        "quantization_config"
    ]
    names = settings["modules_to_not_convert"]
    assert {"lm_head", "model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"} <= set(names)


def test_an_existing_directory_is_replaced_only_where_we_write(model, source, tmp_path):
    target = tmp_path / "q"
    (target / "sub").mkdir(parents=True)
    for name in (
        "notes.txt",
        "tokenizer.json",
        "model-00001-of-00009.safetensors",
        "pytorch_model.bin",
        "sub/mine.txt",
        "config.json",
    ):
        (target / name).write_text("before")
    save_checkpoint(model, target, AwqConfig(group_size=16))
    assert tree(target) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "README.md",
        "notes.txt",
        "sub/mine.txt",
    }
    assert json.loads((target / "config.json").read_text())["model_type"] == "llama"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q", "source"]


@pytest.mark.parametrize("size", ["0", "abc", "5 PB", "", None, 0, -1, 1.5, True])
def test_sizes_that_no_file_can_have(model, size, llama_dir, tmp_path):
    """Refused before any work, by a save and by a quantization that writes block by block."""
    for save_it in (
        lambda: save_checkpoint(model, tmp_path / "q", AwqConfig(), shard_size=size),
        lambda: quantize_directory(llama_dir, tmp_path / "q", shard_size=size),
    ):
        with pytest.raises(ConfigError, match="shard_size"):
            save_it()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["save_pretrained", "companions", "report"])
@pytest.mark.parametrize("existing", [True, False])
def test_no_space_left(model, source, tmp_path, monkeypatch, step, existing):
    """Whatever step runs out of space: one clear error, the old directory untouched, no temporary
    left."""
    target = tmp_path / "q"
    if existing:
        target.mkdir()
        (target / "config.json").write_text("before")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    report = QuantReport({}, {})
    if step == "save_pretrained":
        from safetensors import SafetensorError

        def half(folder, **kwargs):
            (folder / "model.safetensors").write_bytes(b"half")
            raise SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )

        monkeypatch.setattr(model, "save_pretrained", half, raising=False)
    elif step == "companions":
        monkeypatch.setattr("shutil.copyfile", full)
    else:
        monkeypatch.setattr(QuantReport, "save", full)
    with pytest.raises(CheckpointError, match="failed and was undone: .*No space left"):
        save_checkpoint(model, target, AwqConfig(group_size=16), report, source)
    assert sorted(p.name for p in tmp_path.iterdir()) == (
        ["q", "source"] if existing else ["source"]
    )
    assert not existing or (
        tree(target) == {"config.json"} and (target / "config.json").read_text() == "before"
    )
    assert not hasattr(model.config, "quantization_config")


def test_an_interrupt_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), complete_directory(tmp_path / "q") as work:
        (work / "x").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(model, source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        save(model, tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot write beside"):
        save(model, tmp_path / "file" / "below")
    with pytest.raises(CheckpointError, match="original model"):
        save_checkpoint(model, source, AwqConfig(group_size=16), source=source)
    assert (source / "model.safetensors").read_text() == "old"


@pytest.mark.parametrize("version", ["gemv", "gemv_fast"])
def test_shards_and_conversion_across_them(tmp_path, version):
    """Shards cut between the tensors of one linear; converting there and back gives the same
    tensors."""
    packed = packed_model("llama", hidden_size=64, intermediate_size=128)
    save_checkpoint(packed, tmp_path / "q", AwqConfig(group_size=32), shard_size="20KB")
    shards = sorted((tmp_path / "q").glob("*.safetensors"))
    assert len(shards) > 3 and (tmp_path / "q" / "model.safetensors.index.json").is_file()
    assert convert_checkpoint(tmp_path / "q", tmp_path / "other", version) == 21
    assert f"version `{version}`" in (tmp_path / "other" / "README.md").read_text()
    inputs = zoo.token_batch()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    assert loaded.model.layers[0].mlp.up_proj.format == version
    torch.testing.assert_close(zoo.outputs(loaded, **inputs), zoo.outputs(packed, **inputs))
    convert_checkpoint(tmp_path / "other", tmp_path / "back", "GEMM")
    one, two = (
        {
            k: t
            for f in sorted((tmp_path / d).glob("*.safetensors"))
            for k, t in load_file(f).items()
        }
        for d in ("q", "back")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_conversion_refuses(model, tmp_path):
    folder = save(model, tmp_path / "q", group_size=16)
    with pytest.raises(ConfigError, match=r"model\.layers\.0.*gemv_fast"):
        # 32 inputs are no multiple of its 64
        convert_checkpoint(folder, tmp_path / "other", "gemv_fast")
    with pytest.raises(ConfigError, match="unknown"):
        convert_checkpoint(folder, tmp_path / "other", "nothing")
    with pytest.raises(CheckpointError, match="source"):
        convert_checkpoint(folder, folder, "gemv")
    with pytest.raises(CheckpointError, match="not a directory"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "other", "gemv")
    zoo.tiny_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match="not quantized"):
        convert_checkpoint(tmp_path / "dense", tmp_path / "other", "gemv")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.6, "top_p": 0.9}, {"output_hidden_states": True}, {"pad_token_id": -1}],
)
def test_generation_settings_that_transformers_does_not_save(model, settings, tmp_path):
    """Llama 2's files name a temperature beside greedy choice."""
    before = model.generation_config
    model.generation_config = type(before).from_dict(settings)
    try:
        save_checkpoint(model, tmp_path / "out", AwqConfig(group_size=16))
        assert model.generation_config.to_dict().items() >= settings.items()
    finally:
        model.generation_config = before

    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written.items() >= settings.items()
    load_model(tmp_path / "out")


@pytest.mark.parametrize("mode", [0o700, 0o2775, 0o750])
def test_a_directory_keeps_its_mode(model, tmp_path, mode):
    """A private one stays private, a shared one shared."""
    target = tmp_path / "kept"
    for _ in range(2):
        save_checkpoint(model, target, AwqConfig(group_size=16))
        assert (target / "model.safetensors").stat().st_mode & 0o400
        target.chmod(mode)
    save_checkpoint(model, target, AwqConfig(group_size=16))
    assert stat.S_IMODE(target.stat().st_mode) == mode


def test_a_name_that_is_no_text(model, tmp_path):
    """What a disk of another encoding may hold."""
    target = tmp_path / os.fsdecode(b"\xff\xfe model")
    save_checkpoint(model, target, AwqConfig(group_size=16))
    assert (target / "config.json").exists() and os.listdir(tmp_path) == [target.name]


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("write", [check_target, complete_directory, work_folder])
def test_missing_folders_that_another_process_makes_and_removes(
    tmp_path, monkeypatch, write, times
):
    """Two savers look at once whether they can write: each removes what it made and did not use."""
    home = tmp_path / "new" / "deep"
    removed = []

    def make(folder, *arguments, plain=Path.mkdir, **options):
        plain(folder, *arguments, **options)
        if folder == home and len(removed) < times:
            removed.append(folder)
            folder.rmdir()
            folder.parent.rmdir()

    monkeypatch.setattr(Path, "mkdir", make)
    made = write(home / "model")
    if write is not check_target:
        with suppress(ZeroDivisionError), made:
            assert home.exists()
            raise ZeroDivisionError

    assert len(removed) == times
