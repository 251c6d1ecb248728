"""Pages in two languages say the same thing, and no link of any page leads nowhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
ENGLISH = [page for page in PAGES if "zh" not in page.parts and not page.name.endswith(".zh.md")]
CHINESE = [page for page in PAGES if page not in ENGLISH]


def python_blocks(page: Path) -> set[str]:
    return set(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))


def commands(page: Path) -> set[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return {line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.startswith("awq ")}


def test_chinese_code_is_the_english_code_that_the_tests_run():
    known_blocks = set().union(*(python_blocks(page) for page in ENGLISH))
    known_commands = set().union(*(commands(page) for page in ENGLISH))
    for page in CHINESE:
        assert python_blocks(page) <= known_blocks, page
        assert commands(page) <= known_commands, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_resolve(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing
