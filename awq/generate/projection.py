"""Sibling linears as one product, and the modules that stand in their places in the transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
        self.linears = [block.get_submodule(name) for name in source.names]  # a plain list: they belong to the block
        self.rows = None if _in_order(source.rows) else source.rows

    def forward(self, x: Tensor) -> Tensor:
        parts = [linear(x) for linear in self.linears]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return joined if self.rows is None else joined[..., self.rows.to(joined.device)]


class Shared:
    """A joined linear and its last result, which each of the siblings asks for in turn."""

    def __init__(self, linear: WQLinear, siblings: int) -> None:
        self.linear, self.siblings = linear, siblings
        self.x: Tensor | None = None
        self.y: Tensor | None = None
        self.asked = 0

    def __call__(self, x: Tensor) -> Tensor:
        if self.x is not x or self.y is None:
            self.x, self.y, self.asked = x, self.linear(x), 0
        y, self.asked = self.y, self.asked + 1
        if self.asked >= self.siblings:  # kept no longer than needed, and never seen by a changed x
            self.x = self.y = None
        return y


class Slice(nn.Module):
    """Stands for one of several siblings whose weights were joined: outputs `rows` of the shared product.

    It moves with the model, and its state is that of the linear it stands for.
    """

    def __init__(self, shared: Shared, rows: Tensor, stands_for: WQLinear) -> None:
        super().__init__()
        self.shared, self.rows, self._kept, self._biased = shared, rows, stands_for._kept, stands_for.bias is not None
        self.joined = shared.linear  # registered, so that `.to` reaches it
        self.in_features, self.out_features = stands_for.in_features, len(rows)
        first = int(rows[0])
        self.first = first if torch.equal(rows, torch.arange(first, first + len(rows), device=rows.device)) else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(x)
        return y[..., self.rows.to(y.device)] if self.first is None else y.narrow(-1, self.first, self.out_features)

    def part(self) -> WQLinear:
        """The linear it stands for, bit for bit as it was loaded."""
        linear = take_outputs(self.joined, self.rows)
        linear._kept = self._kept
        if not self._biased:  # a sibling of one with a bias
            linear.register_buffer("bias", None)
        return linear

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        return self.part().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)


@dataclass
class Joined:
    """Siblings `names` of a block that became one product."""

    linear: WQLinear
    block: nn.Module
    names: tuple[str, ...]

    def part(self) -> None:
        """Puts the siblings back, bit for bit as they were loaded."""
        for name in self.names:
            replace_module(self.block, name, self.block.get_submodule(name).part())  # type: ignore[operator]


def join(block: nn.Module, source: Source) -> Joined | None:
    """Replaces sibling linears by slices of one linear whose outputs are the channels of `source`, in their order.

    Nothing is held twice. None when they cannot be one packed product, or are one in order already.
    """
    linears = [block.get_submodule(name) for name in source.names]
    if not joinable(linears, source) or (len(linears) == 1 and _in_order(source.rows)):
        return None
    packed: Sequence[WQLinear] = linears  # type: ignore[assignment]
    sizes = [m.out_features for m in packed]
    linear = concatenate_outputs(packed)
    if not _in_order(source.rows):
        linear = take_outputs(linear, source.rows)
    shared, places = Shared(linear, len(packed)), source.rows.argsort().split(sizes)
    for name, rows, sibling in zip(source.names, places, packed):
        replace_module(block, name, Slice(shared, rows, sibling))
    return Joined(linear, block, source.names)


def joinable(linears: Sequence[nn.Module], source: Source) -> bool:
    """Whether linears can be one packed product whose outputs are all the channels of `source`."""
    if not all(isinstance(linear, WQLinear) for linear in linears):
        return False
    shared = {(m.in_features, m.group_size, m.format) for m in linears}  # type: ignore[union-attr]
    return len(shared) == 1 and sum(m.out_features for m in linears) == len(source.rows)  # type: ignore[misc]


def _in_order(rows: Tensor) -> bool:
    return torch.equal(rows, torch.arange(len(rows), device=rows.device))
