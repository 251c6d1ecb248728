"""What every backend is given: three packed tensors and what they mean."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from awq.core.weight import QuantizedWeight
from awq.formats import get_layout


class Shape(NamedTuple):
    """A linear's numbers of inputs and outputs, and of inputs per group (−1 is written out as
    `in_features`)."""

    in_features: int
    out_features: int
    group_size: int


class Packed(NamedTuple):
    """Packed tensors of `layout`: an on-disk format or a backend's own in-memory layout (see
    `awq.formats`)."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    shape: Shape
    layout: str

    def unpack(self) -> QuantizedWeight:
        """The canonical weight [out, in], exactly."""
        tensors = {"qweight": self.qweight, "qzeros": self.qzeros, "scales": self.scales}
        return get_layout(self.layout).unpack(tensors, *self.shape)

    def to_layout(self, layout: str) -> Packed:
        """The same weight in another layout, on the same device."""
        if layout == self.layout:
            return self
        tensors = get_layout(layout).pack(self.unpack())
        return Packed(tensors["qweight"], tensors["qzeros"], tensors["scales"], self.shape, layout)
