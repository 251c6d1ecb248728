"""The code of our pages runs as written, in the order of the page, on tiny models.

A page may use the names and files that `place` and `run_page` give it. A block that cannot run
here says so in a comment of its own line before it, such as `<!-- needs a GPU -->`; `MARKS` holds
what may be said. Chinese pages need no run: `test_pages.py` holds their blocks to the English ones.
"""

import io
import json
import re
import shlex
import shutil

import pytest
import torch
from guide_models import make_models, make_tokenizer
from test_pages import ENGLISH, ROOT
from test_tables import forget

import awq
from awq.calibration.sources import bundled_texts
from awq.cli import main

MARKS = ("needs a GPU", "needs the hub", "needs vLLM", "needs a server")
RUN_HERE = [
    "README.md",
    "docs/quickstart.md",
    "docs/guide.md",
    "docs/generation.md",
    "docs/large-models.md",
    "docs/formats.md",
    "docs/performance.md",
    "docs/migrate.md",
    "docs/cpu.md",
]
RUN_ELSEWHERE = {"docs/embeddings.md": "test_embedding.py", "CONTRIBUTING.md": "test_pages.py"}
BLOCK = re.compile(r"(?:<!-- (.+?) -->\n)?```(python|bash)\n(.*?)```", re.DOTALL)
# Lines of a shell that install something, or are run by another test (`test_clients.py`).
NOT_OURS = ("pip ", "make ", "source ", "python -c ", "#")


def blocks(page):
    """[(mark or "", language, code)] of the page."""
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`my-model`, `my-encoder`, their quantized forms, and files of texts.

    The models have few positions, since a page quantizes many times, and the rows of calibration
    are as short.
    """
    root = tmp_path_factory.mktemp("pages")
    make_models(root / "made", make_tokenizer(), positions=96, encoder_positions=34)
    (root / "made/llama").rename(root / "my-model")
    (root / "made/bert").rename(root / "my-encoder")
    (root / "texts.txt").write_text("\n\n".join(bundled_texts()), encoding="utf-8")
    rows = [json.dumps({"body": text}) for text in bundled_texts()]
    (root / "texts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    for name in ("my-model", "my-encoder"):
        common = ["--calib-data", str(root / "texts.txt"), "--samples", "8", "--preset", "fast"]
        assert main(["quantize", str(root / name), str(root / f"{name}-awq"), *common]) == 0
    return root


def run_command(line, monkeypatch):
    """Runs a line of ours. Tuning as written takes minutes on a GPU; where there is none, it ends
    with status 2."""
    monkeypatch.setattr("sys.stdin", io.StringIO("Where are you?\n/exit\n"))
    words = shlex.split(line, comments=True)[1:]
    expected = 0
    if words[0] == "tune":
        words += ["--tokens", "1", "--seconds", "10"]
        expected = 0 if torch.cuda.is_available() else 2
    assert main(words) == expected, line


@pytest.fixture
def own_tables(tmp_path, monkeypatch):
    """`awq tune` of a page writes beside the page's other files, and serves no later test."""
    monkeypatch.setenv("AWQ_KERNEL_TABLES", str(tmp_path / "tables"))
    forget()
    yield
    forget()


@pytest.mark.usefixtures("own_tables")
@pytest.mark.parametrize("page", RUN_HERE)
def test_code_of_a_page(page, place, tmp_path, monkeypatch):
    if page == "docs/large-models.md":
        pytest.importorskip(
            "transformers.core_model_loading",
            reason="transformers has no loading by parts before 5",
        )
    shutil.copytree(place, tmp_path / "home", symlinks=True)
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setenv("AWQ_CACHE", str(tmp_path / "cache"))
    names = {
        "model_path": "my-model",
        "quant_path": "my-model-awq",
        "encoder_path": "my-encoder",
        "encoder_quant_path": "my-encoder-awq",
        "texts": ["The river is cold.", "Hills are old and rivers are young."],
    }
    for mark, language, code in blocks(page):
        if mark in MARKS:
            continue
        if language == "python":
            exec(compile(code, page, "exec"), names)
            continue
        for line in code.splitlines():
            if line.startswith("awq "):
                run_command(line, monkeypatch)


@pytest.mark.parametrize("page", ENGLISH, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_block_is_left_out(page):
    """A page with code is run by a test, and each shell line is one of ours or an installation."""
    name = str(page.relative_to(ROOT))
    unmarked = [(language, code) for mark, language, code in blocks(name) if mark not in MARKS]
    if name in RUN_ELSEWHERE:
        assert name in (ROOT / "tests" / RUN_ELSEWHERE[name]).read_text(encoding="utf-8")
        return
    assert name in RUN_HERE or not unmarked, f"{name} has code that no test runs"
    shell = [
        line for language, code in unmarked if language == "bash" for line in code.splitlines()
    ]
    strange = [line for line in shell if line and not line.startswith(("awq ", *NOT_OURS))]
    assert not strange


def test_the_guide_names_every_verb():
    code = [code for _, language, code in blocks("docs/guide.md") if language == "bash"]
    lines = [line for block in code for line in block.splitlines() if line.startswith("awq ")]
    assert {line.split()[1] for line in lines} == set(awq.cli.VERBS)
