"""What a model's own code raises, told as an error of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from awq.errors import AwqError, ModelError, first_line

# What a caller can do something about besides: it passes through as it is.
PASSED_ON = (AwqError, MemoryError, torch.OutOfMemoryError)


@contextmanager
def model_code(name: object) -> Iterator[None]:
    """Whatever a model's own forward raises, which no check foresaw, is a ModelError."""
    try:
        yield
    except PASSED_ON:
        raise
    except Exception as error:
        raise ModelError(
            f"the own code of {name} fails: {first_line(error)}; are the settings in its "
            "config.json right?"
        ) from error
