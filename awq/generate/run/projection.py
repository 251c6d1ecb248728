"""Sibling linears as one product, and the modules that stand in their places in the transformers
model.

A live model may be running in other threads while its siblings are joined or separated. Each module
is therefore replaced by
one of equal values, in one assignment: whatever mixture of old and new modules a running forward
meets, it computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import local
from typing import Any

import torch
from torch import Tensor, nn

from awq.generate.plan import Source
from awq.nn.layout import concatenate_outputs, take_outputs
from awq.nn.linear import WQLinear
from awq.nn.surgery import replace_module


class Projection(nn.Module):
    """x [..., in] → the channels of a `Source` [..., wanted], from the block's own linears."""

    def __init__(self, block: nn.Module, source: Source) -> None:
        super().__init__()
        # a plain list: they belong to the block
        self.linears = [block.get_submodule(name) for name in source.names]
        self.rows = None if _in_order(source.rows) else source.rows

    def forward(self, x: Tensor) -> Tensor:
        parts = [linear(x) for linear in self.linears]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return joined if self.rows is None else joined[..., self.rows.to(joined.device)]


@dataclass
class _Product:
    """The joined linear's outputs y for x, and the siblings that have not asked for theirs yet."""

    x: Tensor
    y: Tensor
    state: tuple
    waiting: set[int]


class Shared:
    """A joined linear, and the last product of each thread, of which every sibling asks for its
    part in turn."""

    def __init__(self, linear: WQLinear, siblings: int) -> None:
        self.linear = linear
        self.siblings = siblings
        self._threads = local()

    def __call__(self, sibling: int, x: Tensor) -> Tensor:
        """All outputs for x; sibling: the number of the one that asks."""
        if torch.compiler.is_compiling():
            return self.linear(x)  # the compiler sees that the siblings compute the same

        last: _Product | None = getattr(self._threads, "last", None)
        if (
            last is None
            or last.x is not x
            or sibling not in last.waiting
            or last.state != _state_of(x)
        ):
            last = _Product(x, self.linear(x), _state_of(x), set(range(self.siblings)))

        last.waiting.discard(sibling)
        self._threads.last = last if last.waiting else None  # kept no longer than needed

        return last.y


def _state_of(x: Tensor) -> tuple:
    """What tells a product of the same tensor apart: the tensor changed in place, or gradients are
    wanted now."""
    version = None if x.is_inference() else x._version
    return version, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


class Slice(nn.Module):
    """Stands for one of several siblings whose weights were joined: outputs `rows` of the shared
    product.

    It moves with the model, its state is that of the linear it stands for, and copies and pickles
    of it are that linear.
    """

    def __init__(self, shared: Shared, sibling: int, rows: Tensor, stands_for: WQLinear) -> None:
        super().__init__()
        self.shared = shared
        self.sibling = sibling
        self.rows = rows
        self._kept = stands_for._kept
        self._biased = stands_for.bias is not None
        self.joined = shared.linear  # registered, so that `.to` reaches it
        self.in_features = stands_for.in_features
        self.out_features = len(rows)
        first = int(rows[0])

        in_a_row = torch.arange(first, first + len(rows), device=rows.device)
        self.first = first if torch.equal(rows, in_a_row) else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(self.sibling, x)
        if self.first is None:
            return y[..., self.rows.to(y.device)]
        return y.narrow(-1, self.first, self.out_features)

    @property
    def qweight(self) -> Tensor:
        """The joined linear's, for those who ask a packed linear where its weight is, as PEFT
        does."""
        return self.joined.qweight

    def part(self) -> WQLinear:
        """The linear it stands for, bit for bit as it was loaded, with tensors of its own."""
        with torch.inference_mode(False):  # what was made in inference mode could not be trained on
            linear = take_outputs(self.joined, self.rows)
        linear._kept = self._kept
        if not self._biased:  # a sibling of one with a bias
            linear.register_buffer("bias", None)

        return linear

    def state_dict(
        self,
        *args: Any,
        destination: Any = None,
        prefix: str = "",
        keep_vars: bool = False,
    ) -> Any:
        return self.part().state_dict(
            *args, destination=destination, prefix=prefix, keep_vars=keep_vars
        )

    def __deepcopy__(self, memo: dict) -> WQLinear:
        return self.part()

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _itself, (self.part(),)


def _itself(linear: WQLinear) -> WQLinear:
    return linear


def join(block: nn.Module, source: Source) -> WQLinear | None:
    """Replaces sibling linears by slices of one linear whose outputs are the channels of `source`,
    in their order.

    Nothing is held twice. None when they cannot be one packed product, or are one in order already.
    """
    linears = [block.get_submodule(name) for name in source.names]
    if not joinable(linears, source) or (len(linears) == 1 and _in_order(source.rows)):
        return None

    packed: Sequence[WQLinear] = linears  # type: ignore[assignment]
    sizes = [m.out_features for m in packed]
    with torch.inference_mode(False):
        linear = concatenate_outputs(packed)
        if not _in_order(source.rows):
            linear = take_outputs(linear, source.rows)

    shared = Shared(linear, len(packed))
    places = source.rows.argsort().split(sizes)
    for i, (name, rows, sibling) in enumerate(zip(source.names, places, packed)):
        replace_module(block, name, Slice(shared, i, rows, sibling))

    return linear


def separate(block: nn.Module) -> None:
    """Puts packed linears of their own in the places of all slices, bit for bit as they were
    loaded."""
    slices = [(name, module) for name, module in block.named_modules() if isinstance(module, Slice)]
    for name, module in slices:
        replace_module(block, name, module.part())


def joinable(linears: Sequence[nn.Module], source: Source) -> bool:
    """Whether linears can be one packed product whose outputs are all the channels of `source`."""
    if not all(isinstance(linear, WQLinear) for linear in linears):
        return False
    shared = {(m.in_features, m.group_size, m.format) for m in linears}  # type: ignore[union-attr]
    return len(shared) == 1 and sum(m.out_features for m in linears) == len(source.rows)  # type: ignore[misc]


def _in_order(rows: Tensor) -> bool:
    return torch.equal(rows, torch.arange(len(rows), device=rows.device))
