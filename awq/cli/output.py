"""Printing a verb's result: JSON, or lines for people; the exit statuses."""

from __future__ import annotations

import json
import sys
from typing import Any

OK, FAILED_GATE, ERROR = 0, 1, 2


def show(result: dict[str, Any], as_json: bool, text: str | None = None) -> None:
    """Prints `result` as JSON, or `text` (default: one `key: value` line each)."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        print(
            text
            if text is not None
            else "\n".join(f"{key}: {value}" for key, value in result.items())
        )


def installed_version(package: str) -> str | None:
    """The version of an installed package, read without importing it; None when it is not
    installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def failed_gates(verb: str, failures: list[str]) -> bool:
    """Says on stderr which gates were not kept; whether there are any."""
    for line in failures:
        print(f"awq {verb}: quality gate failed: {line}", file=sys.stderr)
    return bool(failures)
