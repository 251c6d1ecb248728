"""What an encoder is asked for when it is loaded."""

from __future__ import annotations

from typing import Any

import torch

from awq.errors import ConfigError

PRECISIONS = ("float32", "exact", "int8")  # of activations in a compiled encoder


def check_precision(precision: Any, place: torch.device) -> None:
    """Raises ConfigError for a precision that is unknown, or that this device does not offer."""
    if precision not in PRECISIONS:
        raise ConfigError(
            f"precision is {precision!r:.100}; it must be one of {', '.join(PRECISIONS)}."
        )
    if precision != "exact" and place.type != "cpu":
        raise ConfigError(
            f'precision="{precision}" is for CPUs, and the device is {place}; leave it out.'
        )
