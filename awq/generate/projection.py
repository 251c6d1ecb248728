"""Sibling linears as one product, and the modules that stand in their places in the transformers model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from awq.generate.plan import Source
from awq.nn.layout import concatenate_outputs, reorder_outputs
from awq.nn.linear import WQLinear


class Projection(nn.Module):
    """x [..., in] → the channels of a `Source` [..., wanted], from the block's own linears."""

    def __init__(self, block: nn.Module, source: Source) -> None:
        super().__init__()
        self.linears = [block.get_submodule(name) for name in source.names]  # a plain list: they belong to the block
        ordered = torch.equal(source.rows, torch.arange(len(source.rows), device=source.rows.device))
        self.rows = None if ordered else source.rows

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


def join(block: nn.Module, source: Source) -> WQLinear | None:
    """One linear whose outputs are the channels of `source`, in their order; None when they cannot be one packed product.

    The linears of the block are replaced by slices of it; nothing is held twice. A single linear in order is left alone.
    """
    linears = [block.get_submodule(name) for name in source.names]
    if not all(isinstance(linear, WQLinear) for linear in linears):
        return None
    packed: Sequence[WQLinear] = linears  # type: ignore[assignment]
    if len({(m.in_features, m.group_size, m.format) for m in packed}) != 1:
        return None
    if sum(m.out_features for m in packed) != len(source.rows):
        return None
    joined = packed[0] if len(packed) == 1 else concatenate_outputs(packed)
    identity = torch.arange(len(source.rows), device=source.rows.device)
    if not torch.equal(source.rows, identity):
        joined = reorder_outputs(joined, source.rows)
    elif len(packed) == 1:
        return joined
    shared = Shared(joined, len(packed))
    inverse, first = source.rows.argsort(), 0
    for name, linear in zip(source.names, packed):
        parent, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(parent), leaf, Slice(shared, inverse[first : first + linear.out_features]))
        first += linear.out_features
    return joined
