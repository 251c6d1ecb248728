"""Digests of files: what a stored image depends on."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

PIECE = 1 << 20


@cache
def sources() -> str:
    """Digest of this package's modules: another release makes its images anew."""
    root = Path(__file__).parent.parent
    found = hashlib.sha256()
    for folder in ("native", "embed", "kernels/cpu"):
        for path in sorted((root / folder).rglob("*.py")):
            add_file(found, path)

    return found.hexdigest()


def add_file(found: Any, path: Path) -> None:
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            found.update(piece)
