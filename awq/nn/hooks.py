"""Looking into a running model: hooks that are always taken off again.

`hooked` is the one way in which this package listens to other people's modules. It registers a
function on named modules and removes it when its `with` block ends, whatever happens inside.
`inputs_of` runs a forward only as far as the modules whose inputs are wanted, because the rest of
the block would be computed for nothing.

>>> import torch
>>> block = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU())
>>> with hooked(block, ["0"], after=lambda name, output: print(name, tuple(output.shape))):
...     _ = block(torch.zeros(2, 4))
0 (2, 6)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

Before = Callable[[str, tuple], None]
After = Callable[[str, Any], Any]


class _Reached(Exception):
    """Ends a forward whose rest is of no use."""


@contextmanager
def hooked(
    root: nn.Module, names: Iterable[str], before: Before | None = None, after: After | None = None
) -> Iterator[None]:
    """While open, calls `before(name, positional arguments)` and `after(name, output)` around the
    named modules' forwards.

    names: of modules below `root`; "" is `root` itself. What `after` returns replaces the output,
    unless it is None.
    """
    handles = []
    try:
        for name in names:
            module = root.get_submodule(name)
            if before is not None:
                handles.append(module.register_forward_pre_hook(_before(before, name)))
            if after is not None:
                handles.append(module.register_forward_hook(_after(after, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(listen: Before, name: str) -> Callable[[nn.Module, tuple], None]:
    def hook(_module: nn.Module, args: tuple) -> None:
        listen(name, args)

    return hook


def _after(listen: After, name: str) -> Callable[[nn.Module, tuple, Any], Any]:
    def hook(_module: nn.Module, _args: tuple, output: Any) -> Any:
        return listen(name, output)

    return hook


def inputs_of(root: nn.Module, names: Iterable[str], run: Callable[[], Any]) -> dict[str, Tensor]:
    """The first arguments with which `run()` calls the named modules; the forward ends when it has
    come to all of them.

    Modules that it never calls are left out.
    """
    wanted = set(names)
    inputs: dict[str, Tensor] = {}

    def catch(name: str, args: tuple) -> None:
        inputs.setdefault(name, args[0])
        if len(inputs) == len(wanted):
            raise _Reached

    with hooked(root, sorted(wanted), before=catch), suppress(_Reached):
        run()
    return inputs


def input_of(root: nn.Module, name: str, run: Callable[[], Any]) -> Tensor | None:
    """As `inputs_of`, for one module; None when it is never called."""
    return inputs_of(root, [name], run).get(name)
