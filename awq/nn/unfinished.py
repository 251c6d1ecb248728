"""The mark of a model whose quantization was interrupted.

Quantizing changes a live model block by block. When an error or Ctrl-C ends it half way, some
blocks hold quantized weights, one may be neither, and nothing about the modules says so. Whoever
changes a model therefore marks it first and takes the mark away when all is done; whoever
quantizes, saves or generates asks for it. Copies and pickles carry it along.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from awq.errors import ModelError

_MARK = "_awq_unfinished"


@contextmanager
def unfinished(model: Any) -> Iterator[None]:
    """Marks a model as half done inside; the mark stays when the block ends with an error."""
    model.__dict__[_MARK] = True
    yield
    del model.__dict__[_MARK]


def check_finished(model: Any, name: str = "this model") -> None:
    """Raises ModelError for a marked model."""
    if _MARK in vars(model):
        raise ModelError(
            f"the quantization of {name} was interrupted, so its weights are half done; load it "
            "again."
        )
