"""Experts whose products are modules of their own: `SortedProducts`.

Some mixtures hold one product of all experts in a module with a 3-D weight [experts, out, in] and
hand it rows that are sorted by expert, beside how many each expert has: `forward(rows [n, in],
sizes)`. JetMoE does so with the experts of its MLP and with those of its attention. Routing and
activations stay the code of the module around it.

A `SortedProducts` in its place holds the same matrices as linears "0", "1", …, so that they are
quantized, saved and loaded as any other linear. Nothing here knows a model by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from awq.nn.hooks import listening
from awq.nn.surgery import replace_module

_TRIAL_ROWS = 3  # of every expert but the first, which has none
_TOLERANCE = 0.03  # in 16 bits
_GATHERS = (Tensor.__getitem__, Tensor.index_select, torch.index_select)
# (rows [n, in], first, how many): called before the linear of one expert reads them
Watch = Callable[[Tensor, int, int], None]


class SortedProducts(nn.Module):
    """One product of all experts of a layer. watch: see `Watch`."""

    def __init__(self, original: nn.Module) -> None:
        """original: the module that is replaced; its weight is emptied."""
        super().__init__()
        self._original = (original,)  # in a tuple: not a child
        self.watch: Watch | None = None
        weight = cast(Tensor, original._parameters.pop("weight"))
        self.num_experts = len(weight)

        for number, matrix in enumerate(weight.data):
            linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(matrix, requires_grad=False)
            self.add_module(str(number), linear)

    def linears(self) -> list[nn.Module]:
        """Every expert's linear."""
        return [cast(nn.Module, self._modules[str(n)]) for n in range(self.num_experts)]

    def forward(self, inputs: Tensor, sizes: Sequence[int]) -> Tensor:
        """inputs: [n, in], the first `sizes[0]` rows those of expert 0; gives [n, out]."""
        parts = []
        first = 0
        for linear, rows in zip(self.linears(), inputs.split(list(sizes))):
            if len(rows) == 0:
                continue

            if self.watch is not None:
                self.watch(inputs, first, len(rows))
            parts.append(linear(rows))
            first += len(rows)

        return torch.cat(parts)

    def original(self) -> nn.Module:
        """The module of transformers, with the weights of now. All linears are dense."""
        weights = [cast(Tensor, linear.weight).data for linear in self.linears()]
        module = self._original[0]
        module.register_parameter("weight", nn.Parameter(torch.stack(weights), requires_grad=False))
        return module


def sorted_products(model: nn.Module) -> list[str]:
    """Names of the modules that look like one product of all experts."""
    return [name for name, module in model.named_modules() if name and _looks_so(module)]


def _looks_so(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 3 or len(module._parameters) > 1 or module._modules:
        return False
    return len(inspect.signature(type(module).forward).parameters) == 3  # self, rows, sizes


@torch.no_grad()
def expose_sorted(model: nn.Module, names: Sequence[str] | None = None) -> None:
    """Puts a `SortedProducts` in the place of every such module that computes what it should on
    random rows.

    names: of the modules to expose without a trial, whose weights may be elsewhere; None: all.
    """
    for name in sorted_products(model) if names is None else names:
        module = model.get_submodule(name)
        if names is not None or _computes_so(module):
            replace_module(model, name, SortedProducts(module))


def _computes_so(module: nn.Module) -> bool:
    weight = cast(Tensor, module.weight)
    if weight.is_meta:
        return False

    sizes = [0] + [_TRIAL_ROWS] * (len(weight) - 1)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(sizes), weight.shape[2], generator=generator)
    rows = rows.to(weight.device, weight.dtype)
    expected = torch.cat([F.linear(x, w) for x, w in zip(rows.split(sizes), weight)]).float()

    try:
        found = module(rows, sizes)
    except Exception:  # someone else's forward, which takes other things
        return False

    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return float((found.float() - expected).norm()) <= _TOLERANCE * float(expected.norm())


@torch.no_grad()
def conceal_sorted(model: nn.Module) -> None:
    """Puts the original module back where all linears are dense still."""
    for name, module in _exposed(model).items():
        if all(isinstance(linear, nn.Linear) for linear in module.linears()):
            replace_module(model, name, module.original())


def _exposed(root: nn.Module) -> dict[str, SortedProducts]:
    return {n: m for n, m in root.named_modules() if isinstance(m, SortedProducts)}


class GatheredRows(TorchFunctionMode):
    """Remembers, for every number of rows, from which rows of what it was gathered last."""

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[int, tuple[int, Tensor]] = {}

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        if function in _GATHERS and len(args) > 1:
            self._note(args[0], args[-1])
        return function(*args, **(kwargs or {}))

    def _note(self, rows: Tensor, index: Any) -> None:
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            return

        if index.dim() == 1 and rows.dim() == 2:
            self._sources[len(index)] = len(rows), index

    def mask_of(self, rows: int, mask: Tensor | None) -> Tensor | None:
        """bool [rows]: which rows are of real tokens. mask: bool [batch, tokens] of these. A token
        may have had several rows beside each other. None where it is not known."""
        if mask is None or rows not in self._sources:
            return None

        count, index = self._sources[rows]
        times, rest = divmod(count, mask.numel())

        return None if rest else mask.reshape(-1)[index // times]


@contextmanager
def watched_rows(
    root: nn.Module,
    mask: Callable[[], Tensor | None],
    note: Callable[[Tensor | None], None],
    over: Callable[[], None],
) -> Iterator[None]:
    """While open, `note` is told which rows are of real tokens before a linear of exposed sorted
    products below `root` reads them: bool [n], or None where it is not known.

    mask: gives bool [batch, tokens] of the batch that runs, or None without padding. over: called
    when a product has read all its rows.
    """
    members = list(_exposed(root).values())
    if not members:
        yield
        return

    gathered = GatheredRows()

    def watch(inputs: Tensor, first: int, count: int) -> None:
        real = gathered.mask_of(len(inputs), mask())
        note(None if real is None else real[first : first + count])

    for member in members:
        member.watch = watch
    try:
        with gathered, listening(members, after=lambda _: over()):
            yield
    finally:
        for member in members:
            member.watch = None
