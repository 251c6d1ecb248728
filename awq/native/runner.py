"""`Runner`: calls an encoder's program, from any number of threads."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

import numpy as np

from awq.native import matrix_unit
from awq.native.image import LINE, NOWHERE, Image
from awq.native.machine import MachineCode
from awq.native.pool import Pool, helpers_for_this_process
from awq.native.spec import COUNTERS_PER_PHASE, EncoderSpec
from awq.native.team import Team

Rows = Sequence[Sequence[int]]

MAX_PACKED_TOKENS = 512  # of one call of the program: as many as a core keeps near
SLICE_TOKENS = 64  # at most; they share one pass over a layer's weights
LEAST_TOKENS = 6  # of a worker's slice
MAX_KEPT_CALLS = 4
MAX_PRODUCT_BYTES = 512 * 32  # of unpacked weights
TILE_TOKENS = 16  # that products look at together; rows behind the last token are read


class Runner:
    """Embeddings of token ids, packed one text after the other."""

    def __init__(self, image: Image) -> None:
        """Raises OSError where the system does not let the image's program run."""
        self.image = image
        self.spec = image.spec
        if self.spec.matrix_unit and not matrix_unit.is_usable():
            raise OSError("this process may not use the CPU's matrix unit")

        self._layers = _placed(image)
        self._forward, self._pool, self._code = _program(image.code)
        self._index = {name: i for i, name in enumerate(image.job)}
        self._template = self._constants()
        self._calls: list[_Call] = []
        self._teams: dict[int, Team] = {}  # by the size of a call

    @property
    def helpers(self) -> int:
        """Threads that may help a caller."""
        return self._pool.helpers

    def embeddings(
        self,
        rows: Rows,
        types: Rows | None,
        prompt_tokens: int,
        helpers: int,
    ) -> np.ndarray:
        """float32 [texts, hidden] of any number of texts."""
        parts = []
        for start, stop in packs([len(row) for row in rows]):
            own_types = None if types is None else types[start:stop]
            parts.append(self(rows[start:stop], own_types, prompt_tokens, helpers))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def __call__(
        self,
        rows: Rows,
        types: Rows | None = None,
        prompt_tokens: int = 0,
        helpers: int | None = None,
    ) -> np.ndarray:
        """float32 [texts, hidden] of rows of token ids, all at once. types: their token types.
        prompt_tokens: leading ones not pooled.

        helpers: at most so many threads beside the caller's own; they come when they have made such
        calls quicker. Raises ValueError for ids and lengths that cannot be.
        """
        out, call = self._computed(rows, types, prompt_tokens, helpers)
        self._keep(call)
        return out

    def hidden_states(self, rows: Rows, types: Rows | None = None) -> np.ndarray:
        """float32 [tokens of all rows together, hidden]: what is pooled, of any number of rows."""
        lengths = [len(row) for row in rows]
        parts = []
        for start, stop in packs(lengths):
            own = rows[start:stop]
            own_types = None if types is None else types[start:stop]
            _, call = self._computed(own, own_types, 0, None)
            parts.append(call.hidden_states().copy())
            self._keep(call)

        return np.concatenate(parts)

    def _computed(
        self,
        rows: Rows,
        types: Rows | None,
        prompt_tokens: int,
        helpers: int | None,
    ) -> tuple[np.ndarray, _Call]:
        """Embeddings, and the call whose memory holds the rest."""
        lengths = [len(row) for row in rows]
        self._check(rows, lengths)
        tokens = sum(lengths)
        helpers = self.helpers if helpers is None else min(helpers, self.helpers)
        team = self._teams.setdefault(tokens.bit_length(), Team()) if helpers else None
        if team is not None and not team.is_worth_it():
            helpers = 0
        try:
            call = self._calls.pop()
        except IndexError:
            call = _Call(self.spec, self._index, self._template.copy())

        out = np.empty((len(rows), self.spec.hidden), np.float32)
        call.fill(rows, types, lengths, self.image.position_offset, helpers)
        call.set(out=out.ctypes.data, prompt_tokens=prompt_tokens)
        began = time.perf_counter()
        self._run(call, helpers)
        if team is not None:
            team.note(helpers > 0, (time.perf_counter() - began) / tokens)

        return out, call

    def _keep(self, call: _Call) -> None:
        """For the next caller."""
        if len(self._calls) < MAX_KEPT_CALLS:
            self._calls.append(call)

    def _run(self, call: _Call, helpers: int) -> None:
        if helpers and self._pool.run(call.address, helpers):
            return
        call.set(workers=1)
        self._forward(call.address, 0)

    def _check(self, rows: Rows, lengths: list[int]) -> None:
        shortest = min(lengths)
        longest = max(lengths)
        if shortest == 0 or longest > self.image.longest:
            raise ValueError(
                f"texts have {shortest} to {longest} tokens; 1 to {self.image.longest} are "
                "possible."
            )

        least = min(map(min, rows))
        most = max(map(max, rows))
        if least < 0 or most >= self.image.vocabulary:
            raise ValueError(
                f"token ids are {least} to {most}; the table has {self.image.vocabulary} words."
            )

    def why_not(self, rows: Rows) -> str | None:
        """Why these rows of token ids cannot be computed; None when they can."""
        longest = max(map(len, rows))
        if longest > self.image.longest:
            return f"a text has {longest} tokens, and positions end at {self.image.longest}"

        # Families that begin to count positions after the padding's own give a padding word no
        # position of its own.
        padding = self.image.position_offset - 1
        if self.image.position_offset and any(padding in row for row in rows):
            return "a text holds the padding token"
        return None

    def _constants(self) -> np.ndarray:
        """A job of which only what a call decides is missing."""
        image = self.image
        base = image.memory.ctypes.data
        values = {name: base + offset for name, offset in image.fields.items()}
        values["layers"] = self._layers.ctypes.data
        values["words"] = image.words.ctypes.data
        values["max_distance"] = image.max_distance

        return np.array([values.get(name, 0) for name in image.job], np.int64)


def packs(lengths: list[int]) -> list[tuple[int, int]]:
    """(start, stop) of texts that go together: up to so many tokens, at least one text."""
    found = []
    start = 0
    tokens = 0
    for i, length in enumerate(lengths):
        if i > start and tokens + length > MAX_PACKED_TOKENS:
            found.append((start, i))
            start = i
            tokens = 0
        tokens += length

    return [*found, (start, len(lengths))]


def division(tokens: int, workers: int) -> tuple[int, bool]:
    """(tokens of a slice, whether a worker takes a slice through all products of a layer).

    It does where every worker has enough tokens: then the team meets three times in a layer, and a
    token's numbers stay near one core. Of fewer tokens each product is divided by its outputs.
    """
    if workers > 1 and tokens < LEAST_TOKENS * workers:
        return SLICE_TOKENS, False

    slices = workers * -(-tokens // (SLICE_TOKENS * workers))
    size = -(-tokens // slices)
    return size + size % 2, True


def _placed(image: Image) -> np.ndarray:
    """The layers' fields with addresses instead of offsets."""
    given = image.is_address & (image.layers != NOWHERE)
    found = np.where(given, image.layers + image.memory.ctypes.data, image.layers)
    return np.where(image.is_address & ~given, 0, found)


@cache
def _program(code: bytes) -> tuple[Any, Pool, MachineCode]:
    """(forward(job, worker), its helpers, what both live in), once in a process for all encoders of
    the same shape."""
    loaded = MachineCode(code)
    forward = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(loaded.address("forward"))
    pool = Pool(loaded.address("serve"), loaded.address("call"), helpers_for_this_process())
    return forward, pool, loaded


class _Call:
    """What one call of the program is given, and the memory it writes; kept for the next call."""

    def __init__(self, spec: EncoderSpec, index: dict[str, int], job: np.ndarray) -> None:
        self._spec = spec
        self._index = index
        self._job = job
        self._memory = np.empty(0, np.uint8)
        self._shape: tuple[int, ...] = ()
        self._parts: dict[str, int] = {}
        self.address = job.ctypes.data

    def set(self, **fields: int) -> None:
        for name, value in fields.items():
            self._job[self._index[name]] = value

    def fill(
        self,
        rows: Rows,
        types: Rows | None,
        lengths: list[int],
        position_offset: int,
        helpers: int,
    ) -> None:
        tokens = sum(lengths)
        shape = (len(rows), tokens, max(lengths), helpers + 1)
        if shape != self._shape:
            self._lay_out(*shape)
            self._shape = shape

        self._numbers("ids", tokens)[:] = np.fromiter(chain.from_iterable(rows), np.int32, tokens)
        kinds = 0 if types is None else np.fromiter(chain.from_iterable(types), np.int32, tokens)
        self._numbers("types", tokens)[:] = kinds
        starts = self._numbers("starts", len(rows) + 1)
        starts[0] = 0
        np.cumsum(lengths, out=starts[1:])
        positions = self._numbers("positions", tokens)
        positions[:] = np.arange(position_offset, position_offset + tokens)
        if len(rows) > 1:
            positions -= np.repeat(starts[:-1], lengths)

        self._part("counters", 8 * COUNTERS_PER_PHASE * self._spec.phases)[:] = 0
        piece, is_sliced = division(tokens, helpers + 1)
        self.set(workers=helpers + 1, piece_tokens=piece, is_sliced=is_sliced)

    def hidden_states(self) -> np.ndarray:
        """float32 [tokens, hidden], as the last call left them."""
        tokens = self._shape[1]
        width = self._spec.hidden
        return self._part("hidden", 4 * tokens * width).view(np.float32).reshape(tokens, width)

    def _lay_out(self, texts: int, tokens: int, longest: int, workers: int) -> None:
        sizes = _sizes(self._spec, texts, tokens, longest)
        scratch = _scratch_bytes(self._spec, longest)
        sizes["scratch"] = scratch * workers
        lines = {name: _whole_lines(size) for name, size in sizes.items()}
        whole = sum(lines.values()) + LINE
        if len(self._memory) < whole:
            self._memory = np.empty(whole + whole // 4, np.uint8)

        base = self._memory.ctypes.data
        offset = -base % LINE
        for name, size in lines.items():
            self._parts[name] = offset
            self.set(**{name: base + offset})
            offset += size

        self.set(tokens=tokens)
        self.set(texts=texts)
        self.set(scratch_values=scratch // 4)

    def _part(self, name: str, size: int) -> np.ndarray:
        start = self._parts[name]
        return self._memory[start : start + size]

    def _numbers(self, name: str, count: int) -> np.ndarray:
        return self._part(name, 4 * count).view(np.int32)


def _whole_lines(size: int) -> int:
    """Bytes of as many cache lines as that takes."""
    return -(-size // LINE) * LINE


def _sizes(spec: EncoderSpec, texts: int, tokens: int, longest: int) -> dict[str, int]:
    """Bytes of all that is given or written, but for scratch memory."""
    inner = spec.inner * (2 if spec.gated else 1)
    groups = spec.widest // spec.group
    rows = -(-tokens // TILE_TOKENS) * TILE_TOKENS

    return {
        "ids": 4 * tokens,
        "types": 4 * tokens,
        "positions": 4 * tokens,
        "starts": 4 * (texts + 1),
        "counters": 8 * COUNTERS_PER_PHASE * spec.phases,
        "hidden": 4 * rows * spec.hidden,
        "planes": rows * spec.row_bytes(spec.widest),
        "steps": 4 * rows * groups,
        "sums": 4 * rows * groups,
        "wide": 4 * rows * max(spec.channels, inner),
        "branch": 4 * rows * spec.hidden,
        "context": 4 * rows * spec.context,
    }


def _scratch_bytes(spec: EncoderSpec, longest: int) -> int:
    """Of one worker: transposed keys, scores and queries of a head; or unpacked weights and sums of
    a product."""
    padded = -(-longest // TILE_TOKENS) * TILE_TOKENS
    attention = 4 * ((spec.dim + 8) * padded + 8 * spec.dim)
    product = MAX_PRODUCT_BYTES + 2 * spec.planes * TILE_TOKENS * LINE
    return _whole_lines(max(attention, product))
