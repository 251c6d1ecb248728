"""The zoo: every text-bearing model type of the installed transformers, tiny and random, through
the public interface.

    python benchmarks/zoo.py                          # all that is not there yet, then docs/zoo.md
                                                      # and benchmarks/results/zoo.json
    python benchmarks/zoo.py --types qwen3_vl,t5:seq2seq --redo
    python benchmarks/zoo.py --list

Each kind is a forked process of its own with limits of time and memory, `--workers` of them at a
time. What it finds lies in `--state` (one JSON file a kind, written before each step), so that a
run goes on where the last one stopped, and a process that was killed still tells in which step.
`zoo_checks` holds the checks, `tiny_kinds` the models.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import common
import torch
import transformers
import zoo_checks
from tiny_kinds import EXCLUDED, Kind, all_kinds

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "zoo.md", ROOT / "benchmarks" / "results" / "zoo.json"
ON_A_GPU = RESULTS.with_name("zoo-gpu-h200.json")
FACTS = ("commit", "transformers", "torch")  # that each result is kept with
CPU_SECONDS, WALL_SECONDS, MEMORY = 400, 1500, 12 << 30
START = time.monotonic()
ROLES = {
    "causal": "decoders",
    "vlm": "vision- and audio-language models",
    "seq2seq": "encoder-decoders",
    "encoder": "encoders",
    "seqcls": "classifiers",
}


def sweep(
    kinds: Iterable[Kind],
    state: Path,
    workers: int,
    seconds: float = float("inf"),
    lines: Path | None = None,
) -> None:
    """Checks every kind in a process of its own; results go to `state`.

    seconds: since the start of the script, after which no kind is begun and what runs is ended.
    lines: a file that takes each result as a line of JSON, at once.
    """
    state.mkdir(parents=True, exist_ok=True)
    running: dict[int, tuple[Kind, float]] = {}
    waiting = list(kinds)
    while waiting or running:
        if time.monotonic() - START > seconds:
            for pid in running:
                os.kill(pid, 9)
            return
        while waiting and len(running) < workers:
            kind = waiting.pop(0)
            running[_start(kind, state)] = kind, time.monotonic()
        for pid, (kind, begin) in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            late = time.monotonic() - begin > WALL_SECONDS
            if not done and late:
                os.kill(pid, 9)
                done, status = os.waitpid(pid, 0)
            if done:
                del running[pid]
                found = _finish(kind, state, status, late)
                if lines is not None:
                    with lines.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(found) + "\n")
        time.sleep(0.05)


def _start(kind: Kind, state: Path) -> int:
    """Forks a process that checks one kind; its id."""
    pid = os.fork()
    if pid:
        return pid
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    work = Path(tempfile.mkdtemp(prefix="zoo-"))
    try:
        result = zoo_checks.check(kind, work, lambda found: write(state, found.to_dict()))
        write(state, result.to_dict())
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os._exit(0)


def _finish(kind: Kind, state: Path, status: int, late: bool) -> dict[str, Any]:
    path = _path(state, kind.type, kind.role)
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    found = found or {
        "type": kind.type,
        "role": kind.role,
        "step": "start",
        "errors": {},
        "failed": [],
    }
    if found["step"] != "end":
        why = "out of time" if late else f"its process ended with status {status}"
        found["errors"][found["step"]] = why
        found["failed"] = [*found["failed"], found["step"]]
        found = write(state, found)
    print(line_of(found), flush=True)
    return found


def merge(lines: Path, state: Path) -> None:
    """Takes the results of another machine (`--lines` there) into `state`; the last of a kind
    counts."""
    state.mkdir(parents=True, exist_ok=True)
    for line in lines.read_text(encoding="utf-8").splitlines():
        _keep(state, json.loads(line))


@cache
def _where() -> dict[str, Any]:
    return common.head("cpu")


def write(state: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Keeps what was found, with the commit of the code and the releases of transformers and torch:
    a sweep may go on where one stopped, and on another machine."""
    result = {**result, **{name: _where()[name] for name in FACTS}}
    _keep(state, result)
    return result


def _path(state: Path, type_: str, role: str) -> Path:
    return state / f"{type_}.{role}.json"


def _keep(state: Path, result: dict[str, Any]) -> None:
    path = _path(state, result["type"], result["role"])
    path.with_suffix(".new").write_text(json.dumps(result, indent=1), encoding="utf-8")
    path.with_suffix(".new").rename(path)


def read(state: Path) -> dict[str, dict[str, Any]]:
    """ "type:role" → result."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(state.glob("*.json"))]
    return {f"{result['type']}:{result['role']}": result for result in found}


def line_of(result: dict[str, Any]) -> str:
    """One line for people."""
    failed = ", ".join(result["failed"]) or "ok"
    errors = "; ".join(f"{step}: {text[:200]}" for step, text in result["errors"].items())
    share = result.get("share", 0)
    return (
        f"{result['type']}:{result['role']} {failed} share {share} {result.get('checks', {})} "
        f"{result.get('fusion', '')} {errors}"
    )


# The page


def page(results: dict[str, dict[str, Any]]) -> str:
    """`docs/zoo.md`: counts, then a row for every kind."""
    parts = [
        "# The zoo",
        "",
        f"Every text-bearing model type of transformers {_releases(results)}, tiny and "
        "random, quantized through the public",
        "interface and checked: folds keep the function, the output is not further from the "
        "original's than with weights rounded",
        "to nearest, both ways of loading give the same output, tensors have the source's names "
        "on disk, and generation gives the",
        "tokens of transformers' own loop. `python benchmarks/zoo.py` makes this page; the commit",
        "and the releases at which a type was checked are in `benchmarks/results/zoo.json`.",
        "",
        *_counts(results),
        "",
        "Share: text weights in 4 bits. In a tiny model, low-rank parts and routers weigh more "
        "than in a true one.",
        "Folds: linears whose scale went into a producer, of all quantized ones. Generation: "
        "*fused* runs on this package's",
        "blocks; *partly fused* on them with the parts that are named in the model's own code, "
        "over the same cache; *plain* on",
        "transformers' own, which a GPU captures as a CUDA graph where that can be proven.",
        "",
        *_on_a_gpu(json.loads(ON_A_GPU.read_text(encoding="utf-8"))),
    ]
    for role, title in ROLES.items():
        parts += [
            "",
            f"## {title.capitalize()}",
            "",
            "| type | share | folds | generation | what fails, or stays dense |",
        ]
        parts.append("|---|---|---|---|---|")
        parts += [_row(result) for result in results.values() if result["role"] == role]
    parts += ["", "## Left out", ""]
    parts += [f"- {type_}: {reason}" for type_, reason in sorted(EXCLUDED.items())]
    return "\n".join(parts) + "\n"


def _on_a_gpu(found: dict[str, Any]) -> list[str]:
    """How decoders generated there: a sentence of counts, one of what gave other tokens."""
    kinds = found["kinds"]
    states = {"fused": "fused", "partly fused": "partly fused", "captured": "captured"}
    parts = []
    for state, name in states.items():
        rows = [row for row in kinds.values() if _state_of(row) == state]
        graphs = sum(bool(row.get("graph")) for row in rows)
        parts.append(f"{len(rows)} {name} ({graphs} in CUDA graphs)")
    parted = {name for name, row in kinds.items() if row.get("same") is False}
    rounding = {name for name in parted if kinds[name].get("float32", {}).get("same")}
    others, by_rounding = (
        ", ".join(sorted(name.partition(":")[0] for name in names)) or "none"
        for names in (parted - rounding, rounding)
    )
    commits = sorted({row["commit"][:7] for row in kinds.values()})
    return [
        f"On an {found['device']}, transformers {found['transformers']}, of {len(kinds)} decoders "
        f"in float16 (float32 where transformers' own fails so): {', '.join(parts)};",
        f"other tokens than transformers' loop: {others}; in 16 bits alone: {by_rounding} "
        f"(`{ON_A_GPU.name}`; {' and '.join(commits)}).",
    ]


def _state_of(row: dict[str, Any]) -> str:
    return row.get("fusion", "").partition(":")[0]


def _releases(results: dict[str, dict[str, Any]]) -> str:
    """ "5.24.0 (161 types) and 5.23.0 (211)": at which the results were found."""
    counts = Counter(result["transformers"] for result in results.values())
    if len(counts) == 1:
        return next(iter(counts))
    first, *others = sorted(counts, reverse=True)
    rest = ", ".join(f"{release} ({counts[release]})" for release in others)
    return f"{first} ({counts[first]} types) and {rest}"


def _found_with(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What the rows were found with, which the process that writes them need not have: "2.13.0
    (44), 2.11.0 (339)"."""
    found = {}
    for name in FACTS:
        counts = Counter(result[name] for result in results.values())
        several = (f"{value} ({count})" for value, count in counts.most_common())
        found[name] = next(iter(counts)) if len(counts) == 1 else ", ".join(several)
    return found


def _counts(results: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| role | types | built | quantized | all text weights | pass every check | fused | "
        "partly fused |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for role, title in ROLES.items():
        counts: Counter[str] = Counter()
        for result in results.values():
            if result["role"] == role:
                counts.update(_standing(result))
        decodes = role in ("causal", "vlm")
        fused, partly = (counts[how] if decodes else "—" for how in ("fused", "partly"))
        lines.append(
            f"| {title} | {counts['types']} | {counts['built']} | {counts['quantized']} | "
            f"{counts['whole']} | {counts['good']} "
            f"| {fused} | {partly} |"
        )
    return lines


def _standing(result: dict[str, Any]) -> list[str]:
    """The columns of the table of counts in which a result counts."""
    found = ["types"]
    if "build" not in result["errors"]:
        found.append("built")
    if result.get("share"):
        found.append("quantized")
    if result.get("share") and not {"share", "load", "quantize"}.intersection(result["failed"]):
        found.append("whole")
    if not result["failed"]:
        found.append("good")
    if result.get("fusion") == "fused":
        found.append("fused")
    if result.get("fusion", "").startswith("partly fused"):
        found.append("partly")
    return found


def _row(result: dict[str, Any]) -> str:
    folds, linears = result.get("folds", (0, 0))
    state, _, reason = result.get("fusion", "").partition(": ")
    generation = {
        "fused": "fused",
        "partly fused": f"partly fused: {reason}",
        "unfused": f"plain: {reason}",
    }.get(state, "—")
    notes = [f"**{step}**: {text}" for step, text in result["errors"].items()]
    notes += [f"**{name}**" for name in result["failed"] if name not in result["errors"]]
    if result.get("share", 0) < 1:
        notes += [
            f"{share:.0%} {reason}"
            for reason, share in result.get("left", {}).items()
            if share >= 0.005
        ]
    own = result.get("checks", {}).get("generate_of_transformers")
    notes += [f"transformers does not generate: {own}"] if own else []
    text = "; ".join(notes).replace("|", "/").replace("\n", " ")
    return (
        f"| {result['type']} | {result.get('share', 0):.0%} | {folds}/{linears} | "
        f"{generation.replace('|', '/')} | {text} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", default="", help="comma-separated types, or type:role")
    parser.add_argument("--roles", default="", help="comma-separated roles")
    parser.add_argument(
        "--state",
        type=Path,
        default=ROOT / ".cache" / "zoo",
        help="directory of what was found so far",
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--draw", type=int, help="with sizes and switches of this seed, no page")
    parser.add_argument("--redo", action="store_true", help="check again what is there already")
    parser.add_argument("--failed", action="store_true", help="check again what failed")
    parser.add_argument("--list", action="store_true", help="print the kinds and stop")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end by then")
    parser.add_argument("--lines", type=Path, help="append each result here as a line of JSON")
    parser.add_argument("--merge", type=Path, help="take such lines into --state, and stop")
    parser.add_argument("--page", action="store_true", help="write the page and the results only")
    given = parser.parse_args()
    kinds = chosen(given.types, given.roles)
    if given.draw is not None:
        kinds = [kind.drawn(given.draw) for kind in kinds]
    if given.list:
        print("\n".join(map(str, kinds)))
        return
    if given.merge:
        merge(given.merge, given.state)
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("awq").setLevel(logging.ERROR)
    known = {} if given.redo or not given.state.is_dir() else read(given.state)
    if given.failed:
        known = {name: result for name, result in known.items() if not result["failed"]}
    if not given.page:
        waiting = [kind for kind in kinds if str(kind) not in known]
        sweep(waiting, given.state, given.workers, given.seconds, given.lines)
    results = read(given.state)
    if given.page or not (given.types or given.roles or given.draw is not None):
        PAGE.write_text(page(results), encoding="utf-8")
        common.write(RESULTS, "cpu", {**_found_with(results), "kinds": results})
    failures = sum(bool(result["failed"]) for result in results.values())
    print(f"{len(results)} kinds, {failures} with a failure", file=sys.stderr)


def chosen(types: str, roles: str) -> list[Kind]:
    """The kinds of the command line, all of them when nothing is named."""
    kinds = all_kinds()
    wanted = [name for name in types.split(",") if name]
    if wanted:
        kinds = [kind for kind in kinds if kind.type in wanted or str(kind) in wanted]
    if roles:
        kinds = [kind for kind in kinds if kind.role in roles.split(",")]
    return kinds


if __name__ == "__main__":
    main()
