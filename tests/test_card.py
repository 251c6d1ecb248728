"""The model card: metadata of the hub, snippets that run, a command that makes the same weights."""

import re
import shlex
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from test_embedding import sentence_dir  # noqa: F401 - a fixture

from awq.checkpoint.card import hub_id, write_card
from awq.cli import main
from awq.config import AwqConfig

ORIGINAL = (
    "---\nlicense: apache-2.0\nlanguage: [en, zh]\nbase_model: someone/parent\n---\n# Original\n"
)


@pytest.fixture(scope="module")
def place(llama_dir, texts, tmp_path_factory):
    """A folder with `llama`, whose card has a licence and a parent, and `llama-awq`, made by the
    command line."""
    root = tmp_path_factory.mktemp("card")
    shutil.copytree(llama_dir, root / "llama")
    (root / "llama/README.md").write_text(ORIGINAL)
    (root / "texts.txt").write_text("\n\n".join(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        command = "quantize llama llama-awq --calib-data texts.txt --group-size 16 --preset fast"
        assert main([*command.split(), "--evaluate", "texts.txt"]) == 0
    return root


def run_snippets(card, folder, monkeypatch):
    """The names that the card's Python leaves; the model lies in the current directory."""
    monkeypatch.chdir(folder)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    return names


def test_metadata_are_the_hubs(place):
    data = ModelCard.load(place / "llama-awq/README.md").data.to_dict()
    assert data == {
        "license": "apache-2.0",
        "language": ["en", "zh"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["awq", "4-bit", "quantized"],
    }, "the parent of a local original is not what this model is quantized from"


@pytest.mark.parametrize(
    "source, wanted",
    [
        ("owner/name", "owner/name"),
        ("/cache/hub/models--owner--name/snapshots/0a", "owner/name"),
        ("/somewhere/model", None),
        (None, None),
    ],
)
def test_relation_to_an_original_of_the_hub(place, tmp_path, source, wanted):
    assert hub_id(source) == wanted
    shutil.copy(place / "llama-awq/config.json", tmp_path)
    write_card(tmp_path, AwqConfig(group_size=16), source=source)
    data = ModelCard.load(tmp_path / "README.md").data
    relation = None if wanted is None else "quantized"
    assert (data.base_model, data.get("base_model_relation")) == (wanted, relation)


def test_a_decoders_card_runs(place, monkeypatch):
    card = (place / "llama-awq/README.md").read_text()
    names = run_snippets(card, place, monkeypatch)
    assert names["model"].fusion == "fused"
    assert "## Recovery" in card and "| perplexity |" in card
    assert "vllm serve" not in card, "vLLM has no kernel for groups of 16"


def test_the_command_of_the_card_makes_the_same_weights(place, monkeypatch, tmp_path):
    card = (place / "llama-awq/README.md").read_text()
    (command,) = re.findall(r"```bash\n(awq quantize .*)\n```", card)
    before = (place / "llama-awq/model.safetensors").read_bytes()
    shutil.copytree(place, tmp_path / "again", ignore=shutil.ignore_patterns("llama-awq"))
    monkeypatch.chdir(tmp_path / "again")
    assert main(shlex.split(command)[1:]) == 0
    assert (tmp_path / "again/llama-awq/model.safetensors").read_bytes() == before


def test_an_embedding_models_card_runs(sentence_dir, texts, tmp_path, monkeypatch):  # noqa: F811
    from awq import AutoAWQForEmbedding, Encoder

    model = AutoAWQForEmbedding.from_pretrained(str(sentence_dir))
    model.quantize(texts=texts[:20], quant_config={"q_group_size": 16}, evaluate=texts[20:])
    model.save_quantized(tmp_path / "encoder-awq")
    card = (tmp_path / "encoder-awq/README.md").read_text()
    names = run_snippets(card, tmp_path, monkeypatch)
    wanted = Encoder.from_pretrained(tmp_path / "encoder-awq").encode(["A sentence."])
    torch.testing.assert_close(torch.as_tensor(names["vectors"]), wanted)
    data = ModelCard.load(tmp_path / "encoder-awq/README.md").data
    assert data.library_name == "sentence-transformers"
    assert data.pipeline_tag == "sentence-similarity"
    assert f"{model.report.evaluation.mean_cosine:.4f}" in card
