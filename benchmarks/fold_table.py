"""Prints the folds found for every family of the test zoo as a Markdown table (with --write into
docs/folds.md).

python benchmarks/fold_table.py [family ...] [--write]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from awq.folds.find import find_folds

# before benchmarks/zoo.py, which is another one
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import zoo


def folds_of(family: str) -> list:
    """Input groups of the second block of a tiny random model (the first may differ: ModernBERT's
    has no norm)."""
    _name, groups = next(islice(find_folds(zoo.tiny_model(family)), 1, None))
    return groups


def fold_table(families: Sequence[str]) -> str:
    """Markdown: how many groups of linears have a fold, per family, then every group; families not
    installed are left out."""
    found = {family: folds_of(family) for family in families if zoo.available(family)}
    counts = [
        "| family | groups | norm | norm (1+w) | linear | none |",
        "|---|---|---|---|---|---|",
    ]
    lines = ["| family | linears that read one tensor | fold |", "|---|---|---|"]
    for family, groups in found.items():
        kinds = [g.fold.kind if g.fold else "none" for g in groups]
        numbers = (
            len(kinds),
            *(kinds.count(k) for k in ("norm", "norm_plus_one", "linear", "none")),
        )
        counts.append(f"| {family} | {' | '.join(map(str, numbers))} |")
        for group in groups:
            lines.append(
                f"| {family} | {', '.join(group.consumers)} | "
                f"{group.fold.describe() if group.fold else '—'} |"
            )
    return "\n".join([*counts, "", *lines]) + "\n"


def main() -> None:
    table = fold_table([a for a in sys.argv[1:] if a != "--write"] or zoo.FAMILIES)
    if "--write" not in sys.argv:
        print(table, end="")
        return
    page = Path(__file__).parents[1] / "docs" / "folds.md"
    prose = page.read_text(encoding="utf-8").partition("\n| family")[0]
    page.write_text(f"{prose}\n{table}", encoding="utf-8")


if __name__ == "__main__":
    main()
