"""Printing a verb's result: JSON, or lines for people; the exit statuses."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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


def output_file(flag: str, name: str) -> Path:
    """The file that an option names. Raises ConfigError, before any work, where no file can be
    written."""
    from awq.errors import ConfigError

    path = Path(name)
    if path.is_dir():
        raise ConfigError(f"{flag} {name} is a directory; give a file.")
    if not path.parent.is_dir():
        raise ConfigError(f"{flag} {name}: there is no directory {path.parent}.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{flag} {name}: you may not write there.")
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when all is written; on an error nothing is left."""
    if path.exists() and not path.is_file():  # /dev/stdout, a pipe
        yield path
        return

    work = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield work
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


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
