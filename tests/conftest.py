"""Shared fixtures: no hub, a tiny tokenizer, tiny models on disk."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "house",
    "runs",
    "sleeps",
    "under",
    "over",
    "red",
    "blue",
    "old",
    "new",
    "tree",
    "river",
    "and",
    "or",
    "not",
    "quick",
    "slow",
    "stone",
    "water",
    "fire",
]


def make_tokenizer(pad_side: str = "right"):
    """A word-level tokenizer of 64 ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {w: i + 4 for i, w in enumerate(WORDS)}
    vocabulary |= {f"w{i}": i for i in range(len(vocabulary), 64)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side=pad_side, model_max_length=64,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def texts():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 30, (60,), generator=generator).tolist()
    return [" ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (n,), generator=generator)) for n in lengths]


def _on_disk(family: str, folder: Path) -> Path:
    import zoo

    model = zoo.tiny_model(family)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory):
    return _on_disk("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def bert_dir(tmp_path_factory):
    return _on_disk("bert", tmp_path_factory.mktemp("models") / "bert")
