"""Looking into a running model: hooks that are always taken off again.

`listening` is the one way in which this package listens to other people's modules: functions are
called around their forwards until its `with` block ends, whatever happens inside. `hooked` is the
same for modules that are known by name. `inputs_of` runs a forward only as far as the modules whose
inputs are wanted, because the rest of the block would be computed for nothing.

>>> import torch
>>> block = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU())
>>> with hooked(block, ["0"], after=lambda name, output: print(name, tuple(output.shape))):
...     _ = block(torch.zeros(2, 4))
0 (2, 6)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

from torch import Tensor, nn

Before = Callable[[str, tuple], None]
After = Callable[[str, Any], Any]


class Call(NamedTuple):
    """One call of a module's forward. output: None before the forward has run."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


class _Reached(Exception):
    """Ends a forward whose rest is of no use."""


@contextmanager
def listening(
    modules: Iterable[nn.Module],
    before: Callable[[Call], None] | None = None,
    after: Callable[[Call], Any] | None = None,
) -> Iterator[None]:
    """While open, calls `before` and `after` around every forward of `modules`.

    What `after` returns replaces the output, unless it is None.
    """
    handles = []
    try:
        for module in modules:
            if before is not None:
                enter = _entering(before)
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            if after is not None:
                leave = _leaving(after)
                handles.append(module.register_forward_hook(leave, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _entering(listen: Callable[[Call], None]) -> Callable[[nn.Module, tuple, dict], None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        listen(Call(module, args, kwargs))

    return hook


def _leaving(listen: Callable[[Call], Any]) -> Callable[[nn.Module, tuple, dict, Any], Any]:
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        return listen(Call(module, args, kwargs, output))

    return hook


@contextmanager
def hooked(
    root: nn.Module,
    names: Iterable[str],
    before: Before | None = None,
    after: After | None = None,
) -> Iterator[None]:
    """While open, calls `before(name, positional arguments)` and `after(name, output)` around the
    named modules' forwards.

    names: of modules below `root`; "" is `root` itself. What `after` returns replaces the output,
    unless it is None.
    """
    with ExitStack() as stack:
        for name in names:
            module = root.get_submodule(name)
            if before is not None:
                stack.enter_context(listening([module], before=_named_before(before, name)))
            if after is not None:
                stack.enter_context(listening([module], after=_named_after(after, name)))
        yield


def _named_before(listen: Before, name: str) -> Callable[[Call], None]:
    return lambda call: listen(name, call.args)


def _named_after(listen: After, name: str) -> Callable[[Call], Any]:
    return lambda call: listen(name, call.output)


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
