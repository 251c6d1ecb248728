"""`Task`: the one argument of a kernel, declared once and used by both sides.

    TASK = Task(threads=COUNT, x=Array(ELEMENT), y=Array(F32), rows=COUNT, eps=FLOAT)

The caller fills it by keyword, `TASK.pack(threads=1, x=x, y=y, rows=4, eps=1e-6)`, and a field that
is missing or unknown is an error before anything runs. The emitter reads it as `t = TASK.reader(b,
task, element)`: `t.x` is a `Pointer`, `t.rows` an int64, `t.eps` a float32. Every field takes eight
bytes, in the order of the declaration.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from awq.kernels.cpu.emit import Emitter
    from awq.kernels.cpu.values import Pointer, Value


class Array(NamedTuple):
    """A tensor, or None for a null pointer. element: an LLVM type, or ELEMENT for the type that the
    kernel is compiled for."""

    element: Any


ELEMENT = "element"
COUNT = "q"  # an int64; the letters are those of `struct`
FLOAT = "f4x"  # a float32 in eight bytes


class Task:
    """A layout of fields: name → COUNT, FLOAT or `Array`."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields
        self._names = tuple(fields)
        self._arrays = frozenset(name for name, kind in fields.items() if isinstance(kind, Array))
        letters = ("q" if isinstance(kind, Array) else kind for kind in fields.values())
        self._struct = struct.Struct("<" + "".join(letters))

    def pack(self, **values: Any) -> bytes:
        """The task as bytes. An array's value is a tensor, an address or None. Raises TypeError for
        wrong names."""
        if values.keys() != self.fields.keys():
            wrong = sorted(values.keys() ^ self.fields.keys())
            raise TypeError(
                f"a task's fields are {', '.join(self._names)}; missing or unknown: "
                f"{', '.join(wrong)}."
            )
        for name in self._arrays:
            values[name] = _address(values[name])
        return self._struct.pack(*[values[name] for name in self._names])

    def reader(self, b: Emitter, task: Pointer, element: Any) -> Reader:
        """The fields for an emitter. task: the kernel's argument; element: the LLVM type of the
        activations."""
        return Reader(b, task, self.fields, element)


class Reader:
    """Reads a field where the emitter names it: at each access a load is emitted."""

    def __init__(self, b: Emitter, task: Pointer, fields: dict[str, Any], element: Any) -> None:
        self._b = b
        self._task = task
        self._fields = fields
        self._element = element
        self._index = {name: i for i, name in enumerate(fields)}

    def __getattr__(self, name: str) -> Any:
        from_bits = self._converter(self._fields[name])
        return from_bits(self._task.load(self._index[name], align=8))

    def _converter(self, kind: Any) -> Callable[[Value], Any]:
        b = self._b
        if isinstance(kind, Array):
            element = self._element if kind.element == ELEMENT else kind.element
            return lambda bits: b.pointer(bits, element)
        return b.float_of if kind == FLOAT else lambda bits: bits


def _address(value: Any) -> int:
    if value is None:
        return 0
    return value if isinstance(value, int) else value.data_ptr()
