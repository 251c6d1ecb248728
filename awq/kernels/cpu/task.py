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

# of what an `Array` is given: None, an address or a tensor
_ADDRESS = "0 if {0} is None else {0} if type({0}) is int else {0}.data_ptr()"


class Task:
    """A layout of fields: name → COUNT, FLOAT or `Array`.

    pack: (every field by keyword) → the task as bytes. An array's value is a tensor, an address or
    None. Raises TypeError for a field that is missing or unknown.
    """

    def __init__(self, **fields: Any) -> None:
        self.fields = fields
        self.pack = _packer(fields)

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


def _packer(fields: dict[str, Any]) -> Callable[..., bytes]:
    """`Task.pack`, as a function with the fields for its arguments.

    Its source is put together from their names, as `namedtuple` does: Python itself then refuses
    wrong names, and a call takes a third of the time of a loop over the fields. Every kernel of a
    decode step begins with one.
    """
    letters = ["q" if isinstance(kind, Array) else kind for kind in fields.values()]
    values = [
        _ADDRESS.format(name) if isinstance(kind, Array) else name for name, kind in fields.items()
    ]
    source = f"lambda *, {', '.join(fields)}: to_bytes({', '.join(values)})"

    return eval(source, {"to_bytes": struct.Struct("<" + "".join(letters)).pack})
