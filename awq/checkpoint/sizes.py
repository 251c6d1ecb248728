"""Sizes of a config that are far beyond what the files hold.

transformers builds a model of the sizes that `config.json` says before it looks into the files. One
wrong digit would fill the memory, or build layers for hours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from awq.errors import CheckpointError

LARGEST_USUAL = 2**20  # no size of a published model is larger
MOST_LAYERS = 2**12
FAR_BEYOND = 16
# Counts of what a model is made of. transformers makes a module or an entry of a list for each at
# once: of layers the files hold tensors, of the others rows.
_LAYERS = re.compile(r"layers?$|depth$")  # `layer_width` is a size
_ROWS = re.compile(r"block|expert|head|label")

Headers = dict[str, dict[str, Any]]


def check_counts(path: Path, config: dict[str, Any], headers: Headers) -> None:
    """Refuses counts of layers, experts, heads or labels that are far beyond the files.

    path: of the config. config: its content. headers: tensor name → {"shape": …}.
    """
    rows, layers = _bound(headers), max(MOST_LAYERS, FAR_BEYOND * len(headers))
    for name, number in _whole_numbers(config):
        if number > layers and _LAYERS.search(name):
            raise CheckpointError(
                f"{path} says {name} {number}, and the files hold {len(headers)} tensors; copy the "
                "original file."
            )
        if number > rows and _ROWS.search(name):
            raise CheckpointError(
                f"{path} says {name} {number}, and no tensor of the files has a size near it; copy "
                "the original file."
            )


def beyond_the_files(config: dict[str, Any], headers: Headers) -> bool:
    """Whether a number of the config might be a size far beyond those in the files."""
    bound = _bound(headers)
    return any(number > bound for _, number in _whole_numbers(config))


def _bound(headers: Headers) -> int:
    largest = max((size for entry in headers.values() for size in entry["shape"]), default=1)
    return max(LARGEST_USUAL, FAR_BEYOND * largest)


def _whole_numbers(values: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """(name, number); those of a list have the list's name."""
    if isinstance(values, int):
        yield name, values
    elif isinstance(values, dict):
        for key, value in values.items():
            if key != "label2id":  # its keys are words of a task, "record player" among them
                yield from _whole_numbers(value, str(key))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _whole_numbers(value, name)
