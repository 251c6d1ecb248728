"""One block in memory at a time gives what the whole model in memory gives, bit for bit."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from conftest import make_tokenizer
from mixtures import mixture
from safetensors.torch import load_file, save_file
from test_encoder import sentence_directory
from test_kinds import encoder_decoder, vision_language
from transformers import CONFIG_MAPPING

from awq import (
    AutoAWQForCausalLM,
    AutoAWQForEmbedding,
    AwqConfig,
    __version__,
    quantize_directory,
)
from awq.checkpoint.stored_blocks import StoredBlocks
from awq.checkpoint.streaming import StreamedBlocks
from awq.checkpoint.work_folder import WorkFolder, work_folder
from awq.cli import main
from awq.errors import CheckpointError, ConfigError, ModelError
from awq.models.streaming import resume_quantization
from awq.quantize import pipeline
from awq.report import read_report, render_page

pytest.importorskip(
    "transformers.core_model_loading", reason="transformers has no loading by parts before 5"
)

SETTINGS = {"q_group_size": 16}
IDS = torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(1))


def tied():
    """In bfloat16, with a head that is the embeddings."""
    model = zoo.tiny_model("qwen3")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model.bfloat16()


# kind → how to make it, and behind how many blocks its quantization is interrupted
KINDS = {
    "tied": (tied, 0),
    "encoder": (lambda: zoo.tiny_model("bert"), 2),
    "mixture": (lambda: mixture("mixtral"), 1),
    "joined": (lambda: zoo.tiny_model("nomic_bert"), 0),
    "tower": (lambda: vision_language("llava"), 1),
    "encoder_decoder": (lambda: encoder_decoder("t5"), 3),
}


def saved(model, folder):
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(first, second):
    """Whether two directories hold one model."""
    one, other = tensors(first), tensors(second)
    equal = one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    return equal and configs[0] == configs[1]


def without_times(report):
    """Neither times nor memory, and not what a streamed run had planned of both."""
    figures = report.to_dict()
    del figures["resources"]
    for entry in (figures, *figures["linears"]):
        entry.pop("seconds")
    return {name: value for name, value in figures.items() if name != "phases"}


def interrupted(monkeypatch, blocks, act, *arguments, **options):
    """Quantizes with `act` called before the block number `blocks` is worked on; returns what was
    raised."""
    quantize_block, seen = pipeline.quantize_block, []

    def counted(run, visit):
        seen.append(visit)
        if len(seen) == blocks + 1:
            act()
        quantize_block(run, visit)

    with monkeypatch.context() as patch, pytest.raises(BaseException) as raised:
        patch.setattr(pipeline, "quantize_block", counted)
        quantize_directory(*arguments, **options)
    return raised.value


def press_ctrl_c():
    raise KeyboardInterrupt


def read_and_write_ahead(monkeypatch):
    """As with a GPU: blocks are read and written in a thread, while others are worked on."""
    always = property(lambda store: True, lambda store, value: None)
    monkeypatch.setattr(StreamedBlocks, "ahead", always, raising=False)


@pytest.mark.parametrize(
    "kind, ahead",
    [
        *((kind, False) for kind in KINDS),
        ("tied", True),
        ("mixture", True),
        ("encoder_decoder", True),
    ],
)
def test_the_same_as_in_memory(kind, ahead, tmp_path, monkeypatch):
    """Also when Ctrl-C came between: then another call goes on behind the finished blocks."""
    if ahead:
        read_and_write_ahead(monkeypatch)
    if kind == "joined" and "nomic_bert" not in CONFIG_MAPPING:
        pytest.skip("transformers has no nomic_bert")
    make, finished = KINDS[kind]
    source = saved(make(), tmp_path / "source")
    model = AutoAWQForCausalLM.from_pretrained(str(source))
    expected = model.quantize(IDS, quant_config=SETTINGS)
    model.save_quantized(tmp_path / "memory")
    given = (source, tmp_path / "streamed", SETTINGS, IDS)
    if finished:
        error = interrupted(monkeypatch, finished, press_ctrl_c, *given)
        assert isinstance(error, KeyboardInterrupt)
        assert not (tmp_path / "streamed").exists() and (tmp_path / "streamed.awq-work").is_dir()
    report = quantize_directory(*given)
    assert same(tmp_path / "memory", tmp_path / "streamed")
    assert without_times(report) == without_times(expected)
    names = [{p.name for p in (tmp_path / f).iterdir()} for f in ("memory", "streamed")]
    assert {n for n in names[0] ^ names[1] if not n.startswith("model")} == set()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory", "source", "streamed"]


def test_an_embedding_model_by_its_command(bert_dir, texts, tmp_path):
    source = sentence_directory(bert_dir, tmp_path / "source")
    calibration = tmp_path / "texts.txt"
    calibration.write_text("\n".join(texts), encoding="utf-8")
    model = AutoAWQForEmbedding.from_pretrained(str(source))
    model.quantize(texts=str(calibration), quant_config=SETTINGS, preset="fast", evaluate=False)
    model.save_quantized(tmp_path / "memory")
    command = ["quantize", str(source), str(tmp_path / "streamed"), "--stream", "--quiet"]
    command += ["--calib-data", str(calibration), "--group-size", "16", "--preset", "fast"]
    assert main(command) == 0
    assert same(tmp_path / "memory", tmp_path / "streamed")


def test_one_block_in_memory(llama_dir, tmp_path):
    """Values are there while a block is visited, and only its own."""
    from awq.checkpoint.source import Source

    blocks = StreamedBlocks(Source.open(llama_dir), WorkFolder(tmp_path, tmp_path))
    blocks.begin(blocks.lists, [], AwqConfig())

    def present():
        state = blocks.model.state_dict()
        return {
            name.split(".")[2] for name in state if ".layers." in name and not state[name].is_meta
        }

    assert present() == set()
    with blocks.visited("model.layers.1", blocks.model.model.layers[1]):
        assert present() == {"1"}
    assert present() == set()
    with pytest.raises(ModelError, match=r"model\.layers\.1 is quantized and written"):
        blocks.model.model.layers[1](torch.zeros(1, 1, 32))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"preset": "best"}, "needs the whole model"),
        ({"export_compatible": True}, "whole model in memory"),
    ],
)
def test_what_needs_the_whole_model_is_refused(options, words, llama_dir, tmp_path):
    with pytest.raises(ConfigError, match=words):
        quantize_directory(llama_dir, tmp_path / "out", SETTINGS, IDS, **options)
    assert list(tmp_path.iterdir()) == []


def test_blocks_that_share_weights_are_refused(tmp_path):
    model = zoo.tiny_model("llama")
    source = saved(model, tmp_path / "source")
    blocks = StoredBlocks.__new__(StoredBlocks)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    blocks.model, blocks.path = model, source
    blocks._known_names = frozenset(f"model.layers.{i}" for i in range(3))
    with pytest.raises(ModelError, match="shared between blocks"):
        blocks.check_unshared()


@pytest.mark.parametrize(
    "place, words",
    [
        ("model.layers.1.mlp.up_proj", r"layers\.1.*not finite in mlp\.up_proj\.weight"),
        ("model.embed_tokens", r"not finite in model\.embed_tokens\.weight"),
    ],
)
def test_numbers_that_are_not_finite(place, words, tmp_path):
    model = zoo.tiny_model("llama")
    model.get_submodule(place).weight.data[0, 0] = float("nan")
    source = saved(model, tmp_path / "source")
    with pytest.raises(ModelError, match=words):
        quantize_directory(source, tmp_path / "out", SETTINGS, IDS)
    assert not (tmp_path / "out").exists()


# Going on behind the last finished block


def weights_and_index(folder):
    names = [path for path in folder.iterdir() if path.name.startswith(("model", "config"))]
    return {path.name: path.read_bytes() for path in names}


@pytest.fixture
def unfinished(llama_dir, tmp_path, monkeypatch):
    """The arguments of a run that ended behind one block, with its texts in a file."""
    calibration = tmp_path / "texts.txt"
    calibration.write_text("the cat runs over the red house. " * 40, encoding="utf-8")
    source = shutil.copytree(llama_dir, tmp_path / "source")
    given = (source, tmp_path / "out", SETTINGS, str(calibration))
    options = dict(max_calib_samples=4, max_calib_seq_len=16, general_texts=False)
    interrupted(monkeypatch, 1, press_ctrl_c, *given, **options)
    return given, options


def test_resumed_by_its_output_alone(unfinished, tmp_path):
    (source, _, *given), options = unfinished
    quantize_directory(source, tmp_path / "whole", *given, **options)
    assert main(["quantize", "--resume", str(tmp_path / "out"), "--quiet"]) == 0
    assert weights_and_index(tmp_path / "out") == weights_and_index(tmp_path / "whole")
    with pytest.raises(CheckpointError, match="nothing to resume"):
        resume_quantization(tmp_path / "out")


def test_a_resumed_report_tells_of_the_earlier_run_too(unfinished, tmp_path):
    (_, out, *_), _ = unfinished
    state = tmp_path / "out.awq-work" / "progress.json"
    kept = json.loads(state.read_text())
    taken = kept["notes"]["taken"]
    assert taken["seconds"] >= sum(kept["notes"]["phases"].values()) > 0
    taken.update(seconds=4000.0, memory=2**50)
    state.write_text(json.dumps(kept))

    report = resume_quantization(out)
    assert 4000 < report.seconds < 5000
    assert report.resources["measured"]["seconds"] == report.seconds
    assert report.resources["measured"]["memory"] == 2**50  # the higher peak of the two

    view = read_report(out)
    assert view.raw["seconds"] == report.seconds
    assert "1\u00a0h 06\u00a0min" in render_page(view)
    assert f"quantized in {report.seconds:.1f} s" in report.summary()


def test_what_changed_is_named(unfinished, tmp_path):
    given, options = unfinished

    def refusal(*arguments, **changes):
        with pytest.raises(CheckpointError) as raised:
            quantize_directory(*arguments, **{**options, **changes})
        return str(raised.value)

    assert "option rounding was feedback, is nearest" in refusal(*given, preset="fast")
    finer = (*given[:2], {"q_group_size": 8}, given[3])
    assert "setting q_group_size was 16, is 8" in refusal(*finer)
    other = tmp_path / "other.txt"
    other.write_text("a dog sleeps under the old tree. " * 40, encoding="utf-8")
    assert "the calibration text changed" in refusal(*given[:3], str(other))
    state = tmp_path / "out.awq-work" / "run.json"
    before = state.read_text()
    key = '"version of autoawq": '
    state.write_text(before.replace(f'{key}"{__version__}"', f'{key}"0.0"'))
    assert f"version of autoawq was 0.0, is {__version__}" in refusal(*given)
    state.write_text(before)
    weights = load_file(given[0] / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(weights, given[0] / "model.safetensors", metadata={"format": "pt"})
    assert "the weights changed" in refusal(*given)


def test_a_removal_that_is_cut_short_leaves_no_broken_state(tmp_path, monkeypatch):
    def cut_short(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), work_folder(tmp_path / "out") as work:
        (work.path / "progress.json").write_text("{}")
        monkeypatch.setattr(shutil, "rmtree", cut_short)
    assert work.path.exists() and not work.has_progress


def test_a_second_run_into_one_output_is_refused(unfinished, tmp_path):
    given, options = unfinished
    words = "another process is quantizing into"
    with work_folder(tmp_path / "other"), pytest.raises(CheckpointError, match=words):
        quantize_directory(given[0], tmp_path / "other", *given[2:], **options)
    assert not (tmp_path / "other").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs Linux or macOS: limits of files")
@pytest.mark.parametrize("ahead", [False, True])
def test_a_full_disk_loses_no_finished_block(ahead, llama_dir, tmp_path, monkeypatch):
    if ahead:
        read_and_write_ahead(monkeypatch)
    given = (llama_dir, tmp_path / "out", SETTINGS, IDS)
    quantize_directory(llama_dir, tmp_path / "whole", SETTINGS, IDS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    try:
        error = interrupted(monkeypatch, 2, fill_the_disk, *given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(error, CheckpointError) and "failed" in str(error)
    quantize_directory(*given)
    assert weights_and_index(tmp_path / "out") == weights_and_index(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs Linux or macOS: processes are forked")
def test_killed_at_random_moments(llama_dir, tmp_path):
    calibration = tmp_path / "texts.txt"
    calibration.write_text("the cat runs over the red house. " * 40, encoding="utf-8")
    script = Path(__file__).parent.parent / "benchmarks" / "resume.py"
    command = [sys.executable, str(script), str(llama_dir), "--kills", "1"]
    done = subprocess.run(
        [*command, "--calib-data", str(calibration)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == result["identical"] == 1
