"""Printing a verb's result: JSON, or lines for people."""

from __future__ import annotations

import json
from typing import Any


def show(result: dict[str, Any], as_json: bool, text: str | None = None) -> None:
    """Prints `result` as JSON, or `text` (default: one `key: value` line each)."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        print(text if text is not None else "\n".join(f"{key}: {value}" for key, value in result.items()))
