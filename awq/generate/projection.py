"""Sibling linears as one product, and the modules that stand in their places in the transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from awq.generate.plan import Source
from awq.nn.layout import concatenate_outputs, reorder_outputs, split_outputs
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


class Slice(nn.Module):
    """Stands for one of several siblings whose weights were joined: some outputs of the shared product.

    The product is computed once per input: the siblings ask one after the other with the same tensor.
    """

    def __init__(self, shared: Shared, rows: Tensor) -> None:
        super().__init__()
        self.shared, self.rows = shared, rows
        self.in_features, self.out_features = shared.linear.in_features, len(rows)
        first = int(rows[0])
        self.first = first if torch.equal(rows, torch.arange(first, first + len(rows), device=rows.device)) else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(x)
        return y[..., self.rows] if self.first is None else y.narrow(-1, self.first, self.out_features)


class Shared:
    """The joined linear and its last result. Not a module: each of the slices would register it."""

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


@dataclass
class Joined:
    """Siblings that became one product, and what it takes to part them again."""

    linear: WQLinear
    block: nn.Module
    source: Source
    sizes: list[int]
    kept: list[dict[str, Tensor]]

    def part(self) -> None:
        """Puts the siblings back, bit for bit as they were loaded."""
        linear = self.linear
        inverse = self.source.rows.argsort()
        if not _in_order(inverse):
            linear = reorder_outputs(linear, inverse)
        for name, sibling, kept in zip(self.source.names, split_outputs(linear, self.sizes), self.kept):
            sibling._kept = kept
            replace_module(self.block, name, sibling)


def join(block: nn.Module, source: Source) -> Joined | None:
    """Replaces sibling linears by slices of one linear whose outputs are the channels of `source`, in their order.

    Nothing is held twice. None when they cannot be one packed product, or are one in order already.
    """
    linears = [block.get_submodule(name) for name in source.names]
    if not all(isinstance(linear, WQLinear) for linear in linears) or (len(linears) == 1 and _in_order(source.rows)):
        return None
    packed: Sequence[WQLinear] = linears  # type: ignore[assignment]
    sizes = [m.out_features for m in packed]
    if len({(m.in_features, m.group_size, m.format) for m in packed}) != 1 or sum(sizes) != len(source.rows):
        return None
    linear = concatenate_outputs(packed)
    if not _in_order(source.rows):
        linear = reorder_outputs(linear, source.rows)
    shared, places = Shared(linear, len(packed)), source.rows.argsort().split(sizes)
    for name, rows in zip(source.names, places):
        replace_module(block, name, Slice(shared, rows))
    return Joined(linear, block, source, sizes, [m._kept for m in packed])


def _in_order(rows: Tensor) -> bool:
    return torch.equal(rows, torch.arange(len(rows), device=rows.device))
