"""Pages in two languages say the same thing, and no link of any page leads nowhere."""

import ast
import re
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
ENGLISH = [page for page in PAGES if "zh" not in page.parts and not page.name.endswith(".zh.md")]
CHINESE = [page for page in PAGES if page not in ENGLISH]

FRONT_PAGES = ("README.md", "README.zh.md")
RUN_BY_TEST_GUIDE = "autoawq.md"  # the snippets of AutoAWQ's guide, which no English page has
TRANSLATED = [
    (english, chinese) for chinese in CHINESE if (english := ROOT / "docs" / chinese.name).exists()
]
BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LARGE_NUMBERS = {"million": 10**6, "billion": 10**9, "亿": 10**8}


def python_blocks(page: Path) -> set[str]:
    return set(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))


def commands(page: Path) -> set[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return {
        line.split("#")[0].strip()
        for block in blocks
        for line in block.splitlines()
        if line.startswith("awq ")
    }


def test_chinese_code_is_the_english_code_that_the_tests_run():
    known_blocks = set().union(*(python_blocks(page) for page in ENGLISH))
    known_commands = set().union(*(commands(page) for page in ENGLISH))
    for page in CHINESE:
        if page.name == RUN_BY_TEST_GUIDE:
            continue
        assert python_blocks(page) <= known_blocks, page
        assert commands(page) <= known_commands, page


def skeleton(page: Path) -> dict[str, Any]:
    """What a translation keeps: code, names in code font, levels of headings, tables, figures and
    places that links lead to."""
    text = page.read_text(encoding="utf-8")
    prose = BLOCK.sub("", text)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    plain = re.sub(r"`[^`]+`|\]\([^)]*\)|^#+ .*$", " ", prose, flags=re.MULTILINE)
    targets = re.findall(r"\]\(([^)#\s]+)", prose)
    return {
        "code": BLOCK.findall(text),
        "names": Counter(spans),
        "headings": [len(marks) for marks in re.findall(r"^(#+) ", prose, re.MULTILINE)],
        "cells of tables": [row.count("|") for row in prose.splitlines() if row.startswith("|")],
        "figures": Counter(re.findall(r"\d[\d,.]*\d", written_out(plain))),
        "links": {Path(target).name for target in targets},
    }


def written_out(text: str) -> str:
    """200 million and 2 亿 as 200000000."""
    pattern = rf"(\d+) ({'|'.join(LARGE_NUMBERS)})"
    return re.sub(pattern, lambda m: str(int(m.group(1)) * LARGE_NUMBERS[m.group(2)]), text)


@pytest.mark.parametrize("english, chinese", TRANSLATED, ids=lambda page: page.name)
def test_a_chinese_page_is_in_step_with_its_english_page(english, chinese):
    wanted, found = skeleton(english), skeleton(chinese)
    assert wanted.pop("links") <= found.pop("links")
    assert found == wanted


def test_both_front_pages_show_the_same_figures():
    """In their tables, row by row."""
    found = [
        [re.findall(r"\d[\d,.]*\d", row) for row in text.splitlines() if row.startswith("|")]
        for text in ((ROOT / name).read_text(encoding="utf-8") for name in FRONT_PAGES)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_resolve(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_places_that_newcomers_are_sent_to_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    places = re.findall(r"`((?:awq|benchmarks|tests|docs|examples)/[\w/.-]*)`", text)
    assert places
    made_by_the_example = {"awq/kernels/float64.py"}
    assert not [
        place
        for place in places
        if not (ROOT / place).exists()
        and place not in made_by_the_example
        and not place.endswith("NAME.py")
    ]


def test_the_worked_example_is_a_backend():
    """The module that CONTRIBUTING.md writes computes what the reference computes."""
    from awq.core.weight import round_to_nearest
    from awq.formats import get_format
    from awq.kernels import reference
    from awq.kernels.packed import Packed, Shape

    block = next(block for block in python_blocks(ROOT / "CONTRIBUTING.md") if "LAYOUT" in block)
    backend = types.ModuleType("float64")
    exec(compile(block, "CONTRIBUTING.md", "exec"), backend.__dict__)
    tensors = get_format("gemm").pack(round_to_nearest(torch.randn(48, 64), 32))
    packed = Packed(
        tensors["qweight"], tensors["qzeros"], tensors["scales"], Shape(64, 48, 32), "gemm"
    )
    x, bias = torch.randn(5, 64), torch.randn(48)
    assert backend.LAYOUT is None
    assert backend.why_not(x.device, x.dtype, packed.shape) is None
    torch.testing.assert_close(backend.linear(x, packed, bias), reference.linear(x, packed, bias))


def test_the_page_on_the_house_names_rooms_that_exist():
    """Each error it quotes is raised in the file it names, and every folder it lists is there."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \| `(awq/[\w/]+\.py)` \|", page, re.MULTILINE)
    assert len(quoted) >= 9
    for words, room in quoted:
        constants = [
            node.value
            for node in ast.walk(ast.parse((ROOT / room).read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        assert any(words in text for text in constants), f"{room} does not say {words!r}"
    folders = re.findall(r"^\| \d \| `(\w+)/`", page, re.MULTILINE)
    assert {path.name for path in (ROOT / "awq").iterdir() if path.is_dir()} - {
        "__pycache__"
    } <= set(folders) | {"utils"}


def messages_of_the_package():
    """Every text that the package raises or logs, values as …."""
    found = []
    for path in (ROOT / "awq").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                found.append("".join(parts))
    return found


def test_messages_of_the_troubleshooting_page_are_those_of_the_package():
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    ours = page[: page.index("## Messages of other packages")]
    quoted = re.findall(r"^\| `(.+?)` \|", ours, re.MULTILINE)
    quoted = [text for text in quoted if not text.endswith("Error")]
    assert len(quoted) > 30
    known = messages_of_the_package()
    missing = []
    for text in quoted:
        pattern = ".*".join(re.escape(piece) for piece in text.split("…"))
        if not any(re.search(pattern, message, re.DOTALL) for message in known):
            missing.append(text)
    assert not missing


def test_every_class_of_error_is_on_the_troubleshooting_page():
    from awq import errors

    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    classes = [name for name, value in vars(errors).items() if isinstance(value, type)]
    assert all(f"`{name}`" in page or f".{name}`" in page for name in classes)


def test_the_front_page_counts_what_the_zoo_counts():
    """Types and quantized ones, of each role and in all, and how many decoders are fused."""
    zoo = (ROOT / "docs/zoo.md").read_text(encoding="utf-8")
    table = re.findall(
        r"^\| [^|]+ \| (\d+) \| \d+ \| (\d+) \|.* (\S+) \| (\S+) \|$", zoo, re.MULTILINE
    )
    assert len(table) == 5
    totals = [sum(int(row[column]) for row in table) for column in (0, 1)]
    for page in FRONT_PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        rows = re.findall(r"\| (\d+) (?:of|/) (\d+) \|", text)[: len(table)]
        assert rows == [(quantized, types) for types, quantized, *_ in table], page
        fused = re.search(r"\((\d+) types, (\d+) in part\)|（(\d+) 种，部分融合 (\d+) 种）", text)
        assert fused and set(table[0][2:]) == set(filter(None, fused.groups())), page
        assert all(re.search(rf"\b{count}\b", text, re.ASCII) for count in totals), page


def test_the_sites_menu_has_every_page():
    """The site's own build refuses a page that it lacks, and is not part of the tests."""
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert pages <= listed
