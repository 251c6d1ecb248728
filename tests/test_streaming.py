"""One block in memory at a time gives what the whole model in memory gives, bit for bit."""

import json

import pytest
import torch
import zoo
from conftest import make_tokenizer
from safetensors.torch import load_file
from test_encoder import sentence_directory
from test_experts import mixture
from test_kinds import encoder_decoder, vision_language

from awq import AutoAWQForCausalLM, AutoAWQForEmbedding, quantize_directory
from awq.checkpoint.streaming import StreamedBlocks
from awq.cli import main
from awq.errors import ConfigError, ModelError

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


KINDS = {
    "tied": tied,
    "conv1d": lambda: zoo.tiny_model("gpt2"),
    "encoder": lambda: zoo.tiny_model("bert"),
    "mixture": lambda: mixture("mixtral"),
    "joined": lambda: zoo.tiny_model("nomic_bert"),
    "tower": lambda: vision_language("llava"),
    "encoder_decoder": lambda: encoder_decoder("t5"),
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
    figures = report.to_dict()
    for entry in (figures, *figures["linears"]):
        entry.pop("seconds")
    return {name: value for name, value in figures.items() if name != "phases"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_in_memory(kind, tmp_path):
    source = saved(KINDS[kind](), tmp_path / "source")
    model = AutoAWQForCausalLM.from_pretrained(str(source))
    expected = model.quantize(IDS, quant_config=SETTINGS)
    model.save_quantized(tmp_path / "memory")
    report = quantize_directory(source, tmp_path / "streamed", SETTINGS, IDS)
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

    blocks = StreamedBlocks(Source.open(llama_dir), tmp_path)
    blocks.begin(blocks.lists, [])

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
    blocks = StreamedBlocks.__new__(StreamedBlocks)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    blocks._original, blocks.path = model, source
    blocks._known_names = frozenset(f"model.layers.{i}" for i in range(3))
    with pytest.raises(ModelError, match="shared between blocks"):
        blocks._check_unshared()


def test_numbers_that_are_not_finite(tmp_path):
    model = zoo.tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    source = saved(model, tmp_path / "source")
    with pytest.raises(ModelError, match=r"layers\.1.*not finite in mlp\.up_proj\.weight"):
        quantize_directory(source, tmp_path / "out", SETTINGS, IDS)
    assert not (tmp_path / "out").exists()
