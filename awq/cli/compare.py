"""Compare two quantized directories: settings, sizes, integers, and the errors of their reports.

Whether the integers are the same is decided after unpacking, so a directory and its conversion to
another version are equal.
"""

from __future__ import annotations

import argparse
from typing import Any

MOVED_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", help="quantized directory")
    parser.add_argument("second", help="quantized directory")


def run(arguments: argparse.Namespace) -> None:
    from awq.checkpoint.compare import compare_checkpoints
    from awq.cli.output import show

    found = compare_checkpoints(arguments.first, arguments.second)
    show(found.to_dict(), arguments.json, _for_people(arguments, found.to_dict()))


def _for_people(arguments: argparse.Namespace, found: dict[str, Any]) -> str:
    lines = [
        f"first: {arguments.first}",
        f"second: {arguments.second}",
        *_settings(found["settings"]),
        _sizes(*found["weight_bytes"]),
        f"linears in both: {found['shared']}",
        f"of these with the same integers, zeros and scales: {found['equal']}",
        *_only("first", found["only_first"]),
        *_only("second", found["only_second"]),
    ]
    if found["losses"] is not None:
        lines.append(_losses(*found["losses"]))
    lines += _moved(found["differing_weights"])

    return "\n".join(lines)


def _settings(settings: dict[str, tuple[Any, Any]]) -> list[str]:
    lines = []
    for name, (first, second) in settings.items():
        beside = "" if first == second else f" and {second}"
        lines.append(f"{name}: {first}{beside}")
    return lines


def _sizes(first: int, second: int) -> str:
    return f"weights: {first / 1e6:.1f} MB and {second / 1e6:.1f} MB"


def _losses(first: float, second: float) -> str:
    return f"relative output error of the reports: {first:.4f} and {second:.4f}"


def _only(which: str, names: list[str]) -> list[str]:
    return [f"packed in the {which} only: {_some(names)}"] if names else []


def _moved(shares: dict[str, float]) -> list[str]:
    largest = list(shares.items())[:MOVED_SHOWN]
    return [f"  {name}: {100 * share:.1f} % of the integers differ" for name, share in largest]


def _some(names: list[str]) -> str:
    rest = len(names) - MOVED_SHOWN
    return ", ".join(names[:MOVED_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
