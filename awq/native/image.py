"""`Image`: everything that one encoder's program works on, as one file can hold it.

Addresses are offsets in one piece of memory until the image is placed. `texts` says what lies
between a string and token ids, and between the program's result and an embedding, so that whoever
holds an image needs no other file of the model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from awq.native.spec import EncoderSpec

LINE = 64  # bytes of a cache line
NOWHERE = -1  # the offset of what is not given
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Image:
    """job: names of a call's fields, in their order. fields: those that are weights → offset.

    layers int64 [layers, fields of a layer]: offsets where `is_address` [fields of a layer], else
    numbers. memory uint8: the weights. words uint8: the table of embeddings. code: an object file.
    vocabulary: rows of words. position_offset: of the first token. max_distance: of relative
    positions.
    """

    spec: EncoderSpec
    job: tuple[str, ...]
    fields: dict[str, int]
    layers: np.ndarray
    is_address: np.ndarray
    memory: np.ndarray
    words: np.ndarray
    code: bytes
    vocabulary: int
    longest: int
    position_offset: int
    max_distance: int
    texts: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        head = {
            "spec": self.spec._asdict(),
            "job": self.job,
            "fields": self.fields,
            "vocabulary": self.vocabulary,
            "longest": self.longest,
            "position_offset": self.position_offset,
            "max_distance": self.max_distance,
            "texts": self.texts,
            "sizes": {name: len(part) for name, part in self._parts().items()},
        }
        listed = json.dumps(head).encode()
        pieces = [len(listed).to_bytes(_LENGTH_BYTES, "little") + listed, *self._parts().values()]

        return b"".join(piece + bytes(-len(piece) % LINE) for piece in pieces)

    def _parts(self) -> dict[str, bytes]:
        return {
            "layers": self.layers.tobytes(),
            "is_address": self.is_address.tobytes(),
            "memory": self.memory.tobytes(),
            "code": self.code,
            "words": self.words.tobytes(),
        }

    @classmethod
    def from_bytes(cls, content: memoryview) -> Image:
        """An image whose words stay in `content`; the weights are copied, since large pages read
        faster."""
        length = int.from_bytes(content[:_LENGTH_BYTES], "little")
        end = _LENGTH_BYTES + length
        head = json.loads(bytes(content[_LENGTH_BYTES:end]))

        parts = {}
        for name, size in head.pop("sizes").items():
            start = -(-end // LINE) * LINE
            end = start + size
            parts[name] = content[start:end]

        spec = EncoderSpec(**head.pop("spec"))
        is_address = np.frombuffer(bytes(parts["is_address"]), bool)
        layers = np.frombuffer(bytes(parts["layers"]), np.int64)
        memory = large_pages(len(parts["memory"]))
        memory[:] = np.frombuffer(parts["memory"], np.uint8)

        return cls(
            spec=spec,
            job=tuple(head.pop("job")),
            layers=layers.reshape(spec.layers, -1),
            is_address=is_address,
            memory=memory,
            words=np.frombuffer(parts["words"], np.uint8),
            code=bytes(parts["code"]),
            **head,
        )


def large_pages(size: int) -> np.ndarray:
    """uint8 [size] that begins on a page of 2 MB, and is kept on such pages where the system has
    them."""
    import ctypes

    # MADV_HUGEPAGE
    page = 1 << 21
    advice = 14
    memory = np.empty(size + 2 * page, np.uint8)
    start = -memory.ctypes.data % page

    try:
        place = ctypes.c_void_p(memory.ctypes.data + start)
        whole = ctypes.c_size_t(-(-size // page) * page)
        ctypes.CDLL(None).madvise(place, whole, advice)
    except (OSError, AttributeError, TypeError):  # only faster
        pass

    return memory[start : start + size]
