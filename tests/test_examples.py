"""The examples in docstrings (`>>>`) do what they show.

They run in an empty folder with two tiny models beside them, `my-model` and `my-encoder`, and
quantized directories of both.
"""

import doctest
import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zoo
from conftest import make_tokenizer
from test_compiled_encoder import SIZES

from awq import AutoAWQForCausalLM, AutoAWQForEmbedding

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "awq").rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


def uniform_model(input_ids):
    """Every one of 64 tokens is as likely as the others."""
    return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 64))


@pytest.fixture(scope="module")
def quantized(llama_dir, texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized") / "awq"
    model = AutoAWQForCausalLM.from_pretrained(llama_dir, device_map="cpu")
    model.quantize(calib_data=texts, quant_config={"q_group_size": 16})
    model.save_quantized(path)
    return path


@pytest.fixture(scope="module")
def quantized_encoder(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    zoo.build("bert", SIZES).save_pretrained(folder / "dense")
    make_tokenizer().save_pretrained(folder / "dense")
    model = AutoAWQForEmbedding.from_pretrained(folder / "dense", device_map="cpu")
    settings = {"q_group_size": 32}
    model.quantize(texts=texts, quant_config=settings, preset="fast", general_texts=False)
    model.save_quantized(folder / "awq")
    return folder / "awq"


STREAMS = {"awq.models.planning", "awq.models.streaming"}


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module(
    name, llama_dir, bert_dir, quantized, quantized_encoder, texts, tmp_path, monkeypatch
):
    if name in STREAMS:
        pytest.importorskip(
            "transformers.core_model_loading",
            reason="transformers has no loading by parts before 5",
        )
    for source, place in (
        (llama_dir, "my-model"),
        (bert_dir, "my-encoder"),
        (quantized, "my-model-awq"),
        (quantized_encoder, "my-encoder-awq"),
    ):
        shutil.copytree(source, tmp_path / place)
    monkeypatch.setenv("AWQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    known = {
        "model": zoo.tiny_model("llama"),
        "texts": texts,
        "torch": torch,
        "uniform_model": uniform_model,
    }
    result = doctest.testmod(
        import_module(name), extraglobs=known, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert result.attempted and not result.failed


def test_public_verbs_have_examples():
    shown = {
        "awq.checkpoint.convert",
        "awq.embed.encoder",
        "awq.evals.divergence",
        "awq.evals.perplexity",
        "awq.folds.find",
        "awq.models.auto",
        "awq.models.base",
        "awq.models.embedding",
        "awq.models.streaming",
        "awq.report.read",
    }
    assert shown <= set(MODULES)
