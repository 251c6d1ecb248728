"""Which texts share a batch."""

from __future__ import annotations

from collections.abc import Iterator


def batches_by_length(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of texts in batches of at most `batch_size`, longest first.

    A batch of at least a quarter of that ends early where a text would be padded by a third of its
    length: fewer, fuller batches cost more padding than their number saves.
    """
    part: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        wasteful = len(part) * 4 >= batch_size and part and lengths[i] * 4 < lengths[part[0]] * 3
        if part and (len(part) == batch_size or wasteful):
            yield part
            part = []
        part.append(i)

    yield part
