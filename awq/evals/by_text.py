"""Figures on several texts, one for each kind that a model will read: code, chats, prose.

A mean over kinds hides the kind that quantization hurt, so each keeps figures of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from awq.checkpoint.recovery import without_folders


@dataclass(frozen=True)
class FiguresByText:
    """texts: name of a text → its figures, a `Divergence` or a `TextFigures`."""

    texts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"texts": {name: figures.to_dict() for name, figures in self.texts.items()}}

    def summary(self) -> str:
        """The lines of every text, behind its name."""
        names = without_folders(self.texts)
        return "\n".join(
            f"{names[path]}: {figures.summary()}" for path, figures in self.texts.items()
        )


def by_text(figures: Mapping[str, Any]) -> Any:
    """Figures by the name of their text; those of a single text as they are."""
    if len(figures) == 1:
        return next(iter(figures.values()))
    return FiguresByText(dict(figures))
