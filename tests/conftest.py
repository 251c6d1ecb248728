"""Shared fixtures (no hub, a tiny tokenizer, tiny models on disk), and the rule about skipped
tests.

A test may be skipped for one of the reasons in `MAY_SKIP`. Any other skip fails the run: a test
that nobody runs proves nothing. Tests that need a GPU carry the mark `gpu`; `pytest --gpu` (`make
test-gpu`) fails where there is none.
"""

import os
import re
import subprocess
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# what an earlier run compiled must not decide this one
os.environ.setdefault("AWQ_CACHE", "off")
# nor may what `awq tune` measured for this user's GPU: a folder that is never made
os.environ.setdefault("AWQ_KERNEL_TABLES", f"{tempfile.gettempdir()}/awq-tests-without-tables")

import sys
from pathlib import Path

import pytest
import torch

MAY_SKIP = (
    r"needs a GPU",
    r"needs (an x86 CPU|Linux|a CPU with) ?.*",
    r"transformers has no .+",
    r"this transformers' \w+ looks one way only",
    r"(mteb|lm_eval|httpx|fastapi|compressed_tensors|shtab)\b.* is not installed",
    r"AUTOAWQ_\w+ (is not set|names no guide)",  # comparisons with AutoAWQ's own files
)

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

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {
        w: i + 4 for i, w in enumerate(WORDS)
    }
    vocabulary |= {f"w{i}": i for i in range(len(vocabulary), 64)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side=pad_side,
        model_max_length=64,
        # what transformers 5 assumes; 4 would add token types, which decoders do not take
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="session", autouse=True)
def few_general_sentences():
    """Some thousand bundled sentences join the texts that an embedding model is calibrated with:
    how many, benchmarks decided. Here a tenth of them takes the same way in less time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("awq.models.embedding.GENERAL_SENTENCES", 300)
        yield


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def texts():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 30, (60,), generator=generator).tolist()
    return [
        " ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (n,), generator=generator))
        for n in lengths
    ]


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


def pytest_addoption(parser):
    parser.addoption(
        "--gpu",
        action="store_true",
        help="there must be a GPU: tests marked `gpu` may not be skipped",
    )


# Of several processes the last to end decides: what takes one of them long comes first.
LONG_MODULES = (
    "test_gpu_products",
    "test_gpu_experts",
    "test_guide",
    "test_embedding",
    "test_zoo",
    "test_tuning",
    "test_triton",
    "test_trained_mixture",
    "test_fuzz",
    "test_crash",
    "test_team",
    "test_generate",
)


def _place(item):
    name = item.path.stem
    return LONG_MODULES.index(name) if name in LONG_MODULES else len(LONG_MODULES)


def pytest_collection_modifyitems(config, items):
    items.sort(key=_place)  # others keep their order
    if torch.cuda.is_available() or config.getoption("--gpu"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """A process whose parent has used a GPU can use none, and may die of it: tests that fork run in
    a process of their own that sees no GPU."""
    if pyfuncitem.get_closest_marker("forks") is None or not torch.cuda.is_available():
        return None

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", pyfuncitem.nodeid],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return True


def pytest_configure(config):
    if config.getoption("--gpu") and not torch.cuda.is_available():
        raise pytest.UsageError("--gpu: torch sees no GPU on this machine.")
    config.pluginmanager.register(_SkipRule(config), "skip-rule")


class _SkipRule:
    """Fails a run in which a test was skipped for a reason that is not in `MAY_SKIP`."""

    def __init__(self, config):
        self.config = config
        self.wrong = []

    def _look(self, report):
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not any(re.fullmatch(pattern, reason) for pattern in MAY_SKIP):
            self.wrong.append(f"{report.nodeid}: {reason}")

    def pytest_runtest_logreport(self, report):
        self._look(report)

    def pytest_collectreport(self, report):
        self._look(report)

    def pytest_sessionfinish(self, session):
        if self.wrong and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for line in self.wrong:
            terminalreporter.write_line(
                f"skipped for a reason that is not on the list of tests/conftest.py: {line}",
                red=True,
            )
