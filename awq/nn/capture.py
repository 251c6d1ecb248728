"""Other people's forwards inside CUDA graphs.

A CUDA graph is a recording of kernels that the GPU replays by itself, so it pays where starting
kernels one by one takes the host longer than running them takes the GPU. While a stream is recorded
the host cannot learn anything from the GPU and cannot
send it numbers: no `.item()`, no `if mask.all()`, no `torch.tensor(0.5, device=gpu)`. Models
written for eager torch do all three. There are two ways to meet them here:

- `NothingFromTheHost` rewrites the few idioms that have an equal form without the host's numbers.
- `no_waiting` finds the others in a trial run and raises. That matters because a capture that fails
  half-way leaves torch's allocator and random state in disorder, while a trial run that fails
  leaves nothing behind.

Both are modes of the calling thread alone, and `capture` records in CUDA's thread-local mode:
requests that other threads serve meanwhile neither fail nor end up in the recording.
"""

from __future__ import annotations

import operator
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Result = TypeVar("Result")

# Operators whose result, or the size of it, the host must know.
_ASKING = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::bincount",
}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class NothingFromTheHost(TorchFunctionMode):
    """What models write that copies a number from the host, or asks the device for one, which no
    capture can, done without: the results are the same.

    `torch.tensor(number, device=gpu)`, as masks are made with, becomes `full`; an index of one
    number in a list, a slice. What models ask of the number of tokens in a cache is answered where
    the answer is the same for every number that fits (see `_Counts`).
    """

    def __init__(self, counts: Iterable[Tensor] = (), most: int = 0) -> None:
        """counts: int64 [] each, the numbers of tokens in the layers of a cache; most: that fit."""
        super().__init__()
        self._counts = _Counts(counts, most)

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._counts:
            answer = self._counts.answer(function, args, kwargs)
            if answer is not None:
                return answer

        if function is torch.tensor and len(args) == 1 and isinstance(args[0], (bool, int, float)):
            return torch.full((), *args, **kwargs)

        if (
            function is Tensor.__getitem__
            and isinstance(args[1], tuple)
            and sum(map(_is_list, args[1])) == 1
        ):
            args = (args[0], tuple(_one_wide(i) for i in args[1]))

        return function(*args, **kwargs)


class _Known(NamedTuple):
    """sign · count + offset"""

    sign: int
    offset: int


class _Counts:
    """What is known of a cache's number of tokens, and of what was added to it or taken from it.

    Models choose by it: whether a table of positions must grow, where a bias begins. With room for
    64 tokens, `2 + count > 130` is false whatever the count. `arange(count, count + n)` has n
    entries.
    """

    def __init__(self, counts: Iterable[Tensor], most: int) -> None:
        """Of counts from 0 to `most`."""
        self.most = most
        # by id: (the tensor, which must live as long, what is known of it)
        self._known = {id(count): (count, _Known(1, 0)) for count in counts}
        self._counters = set(self._known)
        self._truths: dict[int, tuple[Tensor, bool]] = {}  # by id, of comparisons

    def __bool__(self) -> bool:
        return bool(self._known)

    def answer(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The function's result where the device need not be asked; None where it may be called."""
        name = getattr(function, "__name__", "")
        if name.endswith("_") and name not in _SUMS:
            self._forget_changed(name, args)
        if name == "__bool__":
            _, truth = self._truths.get(id(args[0]), (None, None))
            return truth
        if len(args) != 2 or (kwargs and name != "arange"):
            return None

        a, b = map(self._of, args)
        if a is None or b is None:
            return None

        if name == "arange":
            return self._places(args[0], a, b, kwargs)
        if name in _SUMS:
            return self._sum(function, args, a, b)
        if name in _ORDERS:
            return self._comparison(function, args, a, b)
        return None

    def _forget_changed(self, name: str, args: tuple) -> None:
        """What is changed in place is no longer what it was; a cache's own count stays one."""
        in_place = not name.endswith("__") or name.startswith("__i")
        if in_place and args and id(args[0]) not in self._counters:
            self._known.pop(id(args[0]), None)

    def _places(self, start: Any, a: _Known, b: _Known, kwargs: dict[str, Any]) -> Tensor | None:
        """arange(count + i, count + j)"""
        if a.sign != b.sign or a.sign == 0:
            return None
        return start + torch.arange(b.offset - a.offset, **kwargs)

    def _sum(self, function: Any, args: tuple, a: _Known, b: _Known) -> Any:
        left, right = _SUMS[function.__name__]
        result = function(*args)
        sign = left * a.sign + right * b.sign
        offset = left * a.offset + right * b.offset
        self._known[id(result)] = result, _Known(sign, offset)

        return result

    def _comparison(self, function: Any, args: tuple, a: _Known, b: _Known) -> Any:
        """Noted where it has one outcome for every count."""
        sign = a.sign - b.sign
        offset = a.offset - b.offset

        # the difference for no token and for most
        first = offset
        last = offset + sign * self.most
        result = function(*args)
        holds = _ORDERS[function.__name__]
        passes_zero = min(first, last) <= 0 <= max(first, last)
        if holds(first, 0) != holds(last, 0) or (holds in _EQUALITIES and passes_zero):
            return result

        self._truths[id(result)] = result, holds(first, 0)
        return result

    def _of(self, value: Any) -> _Known | None:
        """What is known of a count or an int."""
        if type(value) is int:
            return _Known(0, value)
        _, known = self._known.get(id(value), (None, None))
        return known


_SUMS = {"add": (1, 1), "sub": (1, -1), "__rsub__": (-1, 1)}  # signs of the two operands
_ORDERS = {name: getattr(operator, name) for name in ("gt", "ge", "lt", "le", "eq", "ne")}
_EQUALITIES = (operator.eq, operator.ne)


def _is_list(index: Any) -> bool:
    return isinstance(index, (list, Tensor))


def _one_wide(index: Any) -> Any:
    """[i] → i : i + 1; any other index as it is."""
    if isinstance(index, list) and len(index) == 1 and type(index[0]) is int:
        return slice(index[0], index[0] + 1 or None)
    return index


class NoWaiting(TorchDispatchMode):
    """Raises RuntimeError where the host would wait for a device of this type; see `no_waiting`."""

    def __init__(self, device_type: str = "cuda") -> None:
        super().__init__()
        self.device_type = device_type

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._waits(function, args, kwargs):
            raise RuntimeError(f"{function} makes the host wait for the device")

        with self:  # in inference mode operators arrive here before they are taken apart
            result = function.decompose(*args, **kwargs)
        return function(*args, **kwargs) if result is NotImplemented else result

    def _waits(self, function: Any, args: Any, kwargs: Any) -> bool:
        name = function._schema.name
        if name in _ASKING:
            return self._is_there(args[0])
        if name == "aten::_to_copy":
            return self._copies(args[0], kwargs.get("device"), kwargs.get("non_blocking"))
        if name == "aten::copy_":
            return self._copies(
                args[1], args[0].device, kwargs.get("non_blocking", args[2:3] == (True,))
            )
        if name in _INDEXING:
            return self._is_there(args[0]) and any(_is_mask(index) for index in args[1])
        if name == "aten::repeat_interleave":
            # one number of repeats is known to the host
            counted = function._overloadname != "self_int"
            return counted and self._is_there(args[0]) and kwargs.get("output_size") is None
        return False

    def _is_there(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device.type == self.device_type

    def _copies(self, source: Tensor, target: Any, asynchronous: Any) -> bool:
        """Whether this is a copy between the device and another one that waits until it is done."""
        if target is None or asynchronous:
            return False
        kinds = {source.device.type, torch.device(target).type}
        return len(kinds) == 2 and self.device_type in kinds


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def no_waiting() -> NoWaiting:
    """Inside, whatever makes the host wait for the GPU raises RuntimeError, in this thread alone.

    torch's own `set_sync_debug_mode` belongs to the process: with it, requests in other threads
    would fail too.
    """
    return NoWaiting()


@contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """Work inside goes to `stream`, after what the current stream has done so far; the current one
    then waits for it."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


# torch keeps the graphs of a device in a set of its random generator, and changes that set without
# a lock when a graph is recorded and when one is dropped. At once, in two threads, they end the
# process ("The graph should be registered to the state"). Whoever holds this lock may do either.
_registry = threading.Lock()
_dropped: deque[Any] = deque()
# Recordings that failed: a traceback may hold them for long and drop them anywhere, so they stay.
_failed: list[Any] = []


class Graph:
    """A recorded CUDA graph, which any thread may drop at any time, the garbage collector
    included."""

    def __init__(self, recording: Any) -> None:
        self._recording = recording

    def replay(self) -> None:
        self._recording.replay()

    def pool(self) -> Any:
        """The memory of its intermediate results, to share with graphs that never run at once."""
        return self._recording.pool()

    def __del__(self) -> None:
        _dropped.append(self.__dict__.pop("_recording", None))
        # A garbage collection may run inside of `capture` itself, so nobody waits here: whoever has
        # the lock frees it.
        if _registry.acquire(blocking=False):
            try:
                _dropped.clear()
            finally:
                _registry.release()


def capture(
    function: Callable[[], Result],
    stream: Any = None,
    pool: Any = None,
) -> tuple[Graph, Result]:
    """(a CUDA graph of what `function` does, its result), which every `graph.replay()` overwrites.

    function: has run before, so that nothing is compiled or allocated for good inside. stream: to
    record on (None: torch's own for captures); pool: memory shared with other graphs that never run
    at once.
    """
    with _registry:
        recording = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(
                recording, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                result = function()
        except BaseException:
            _failed.append(recording)
            raise
        finally:
            _dropped.clear()
    return Graph(recording), result
