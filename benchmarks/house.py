"""Figures of the house: size, density, circles, repetition, and how many places do the same thing.

    python benchmarks/house.py --root ../before
    python benchmarks/house.py

Run it on two checkouts to see what a change of structure did. Only the text of `awq/` is read;
nothing is imported.

- density: nodes of the syntax tree for each line of a function, for functions of 8 lines and more.
  Plain code of the field has 5 to 8.
- circles: groups of modules that import each other, imports inside functions counted.
- repetition: runs of six lines, blanks and comments left out, that occur more than once.
- hook sites: calls that register a hook. walkers: functions that record the calls of a model's
blocks.
- choosers: modules that decide which implementation computes: they ask whether a kernel runs on a
  device, or read `TRITON_INTERPRET`.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIN_LINES = 8  # shorter functions say little about density
RUN_LINES = 6
DENSEST_SHOWN = 10
LONG_FILE = 400  # lines; longer files have mostly more than one reason to change

Function = ast.FunctionDef | ast.AsyncFunctionDef
Sources = dict[Path, str]


def read(root: Path) -> Sources:
    """Path → text of every module of the package."""
    return {path: path.read_text(encoding="utf-8") for path in sorted((root / "awq").rglob("*.py"))}


def functions(tree: ast.AST) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield node


def density(function: Function) -> float | None:
    """Syntax nodes a line; None for a function that is too short to tell."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    nodes = sum(1 for _ in ast.walk(function))
    return nodes / lines if lines >= MIN_LINES else None


def densities(sources: Sources) -> list[tuple[float, str]]:
    """(nodes a line, module:function), the densest first."""
    rows = []
    for path, text in sources.items():
        for function in functions(ast.parse(text)):
            value = density(function)
            if value is not None:
                module = path.parent.name if path.stem == "__init__" else path.stem
                rows.append((round(value, 1), f"{module}:{function.name}"))
    return sorted(rows, reverse=True)


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, modules: set[str]) -> set[str]:
    """Modules of the package that a module imports, also inside functions; what is for type
    checkers only is left out."""
    found = set()
    for node in _executed(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
    return found & modules


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _executed(child)


def circles(sources: Sources, root: Path) -> list[list[str]]:
    """Groups of modules of which each reaches every other."""
    names = {module_name(path, root): text for path, text in sources.items()}
    graph = {
        name: imports(ast.parse(text), set(names)) - {name, "awq"} for name, text in names.items()
    }
    reach = {name: _reachable(graph, name) for name in graph}
    groups = {
        tuple(sorted({name} | {o for o in reach[name] if name in reach[o]}))
        for name in graph
        if name in reach[name]
    }
    return [list(group) for group in sorted(groups)]


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = list(graph[start])
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += graph.get(name, ())
    return seen


def repeated_runs(sources: Sources) -> int:
    """Different runs of six lines that occur more than once. A statement is one line here, however
    it is broken, so that the formatter's width does not count."""
    places: dict[tuple[str, ...], int] = defaultdict(int)
    for text in sources.values():
        lines = [line.strip() for line in ast.unparse(ast.parse(text)).splitlines()]
        lines = [line for line in lines if line and not line.startswith(("import ", "from "))]
        for first in range(len(lines) - RUN_LINES + 1):
            places[tuple(lines[first : first + RUN_LINES])] += 1
    return sum(1 for count in places.values() if count > 1)


def calls(sources: Sources, *names: str) -> dict[str, int]:
    """Module → how often it calls a function or method of one of these names."""
    found: dict[str, int] = defaultdict(int)
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                called = (
                    node.func.attr
                    if isinstance(node.func, ast.Attribute)
                    else getattr(node.func, "id", "")
                )
                if called in names:
                    found[str(path.name)] += 1
    return dict(found)


def walkers(sources: Sources) -> list[str]:
    """Functions that record the calls of a model's blocks, each of which then walks over them in
    its own way."""
    found = []
    for path, text in sources.items():
        for function in functions(ast.parse(text)):
            if function.name != "record_block_calls" and "record_block_calls(" in ast.unparse(
                function
            ):
                found.append(f"{path.name}:{function.name}")
    return found


def choosers(sources: Sources) -> list[str]:
    """Modules of the package that ask which implementation can compute."""
    words = (
        r"\btriton_problem\(",
        "TRITON_INTERPRET",
        r"why_not\(device",
        r"cpu\.problem\(",
        r"block_step\(",
        r"[^_]kernels\(",
    )
    asking = re.compile("|".join(words))
    answering = re.compile(r"^def (why_not|triton_problem)\(", re.MULTILINE)
    found = []
    for path, text in sources.items():
        if asking.search(answering.sub("", text)):
            found.append(f"{path.parent.name}/{path.name}")
    return found


def long_files(sources: Sources) -> dict[str, int]:
    """Module → lines, of those past `LONG_FILE`, the longest first."""
    lengths = {f"{p.parent.name}/{p.name}": text.count("\n") for p, text in sources.items()}
    longest_first = sorted(lengths, key=lambda name: -lengths[name])
    return {name: lengths[name] for name in longest_first if lengths[name] > LONG_FILE}


def report(root: Path) -> dict[str, Any]:
    sources = read(root)
    rows = densities(sources)
    return {
        "modules": len(sources),
        "lines": sum(text.count("\n") for text in sources.values()),
        f"files past {LONG_FILE} lines": long_files(sources),
        "longest line": max(len(line) for text in sources.values() for line in text.splitlines()),
        "fmt: skip": sum(text.count("# fmt: skip") for text in sources.values()),
        "nodes a line, median": round(statistics.median(value for value, _ in rows), 1),
        "functions above 14 nodes a line": sum(value > 14 for value, _ in rows),
        "densest": rows[:DENSEST_SHOWN],
        "import circles": circles(sources, root),
        "repeated runs of six lines": repeated_runs(sources),
        "hook sites": calls(sources, "register_forward_hook", "register_forward_pre_hook"),
        "walkers": walkers(sources),
        "choosers": choosers(sources),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root", type=Path, default=Path(__file__).parent.parent, help="a checkout"
    )
    args = parser.parse_args()
    for name, value in report(args.root.resolve()).items():
        print(f"{name}: {json.dumps(value, ensure_ascii=False)}")


if __name__ == "__main__":
    main()
