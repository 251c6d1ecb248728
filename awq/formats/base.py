"""What a packed format is, and the nibble arithmetic that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from awq.core.weight import QuantizedWeight
from awq.errors import ConfigError

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Format:
    """One on-disk layout.

    name: as `config.json` spells it, in lower case.
    encode: QuantizedWeight → {"qweight", "qzeros", "scales"}.
    decode: the inverse, with (in, out, group_size).
    shapes: (in, out, group_size) → shape and dtype of each tensor.
    reason: why a shape cannot be stored, or None.
    features: the two sizes of a stored qweight → (in, out). None for layouts that no file holds.
    bijective: every content of the tensors is some weight, so that packing what was unpacked gives
        the same bytes.
    """

    name: str
    encode: Callable[[QuantizedWeight], dict[str, Tensor]]
    decode: Callable[[Mapping[str, Tensor], int, int, int], QuantizedWeight]
    shapes: Callable[[int, int, int], Shapes]
    reason: Callable[[int, int, int], str | None]
    features: Callable[[int, int], tuple[int, int]] | None = None
    bijective: bool = False

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Tensors as a checkpoint holds them; codes and zeros are clamped to 0 … 15.

        Raises ConfigError for other than 4 bits, a shape that does not fit, or values that the
        layout cannot hold.
        """
        if weight.bits != 4:
            raise ConfigError(f"packed formats hold 4 bits, not {weight.bits}.")

        out_features, in_features = weight.codes.shape
        problem = self.why_not(in_features, out_features, weight.group_size)
        if problem:
            raise ConfigError(f"{self.name} cannot store this weight: {problem}")
        # A value above 15 would spill into the neighbouring nibble.
        return self.encode(
            weight._replace(codes=weight.codes.clamp(0, 15), zeros=weight.zeros.clamp(0, 15))
        )

    def unpack(
        self,
        tensors: Mapping[str, Tensor],
        in_features: int,
        out_features: int,
        group_size: int,
    ) -> QuantizedWeight:
        """Inverse of `pack`: exact, tensor for tensor."""
        return self.decode(tensors, in_features, out_features, group_size)

    def features_of(self, qweight: Tensor) -> tuple[int, int]:
        """(in, out) of the linear whose packed codes a checkpoint holds in `qweight`, two axes."""
        if self.features is None:
            raise ConfigError(f"{self.name} is a layout in memory; no checkpoint holds it.")
        rows, columns = qweight.shape
        return self.features(rows, columns)

    def empty(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Tensors of the right shapes and dtypes to load into (device "meta" works)."""
        found = self.shapes(in_features, out_features, group_size)
        return {
            name: torch.zeros(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in found.items()
        }

    def why_not(self, in_features: int, out_features: int, group_size: int) -> str | None:
        """Why a linear of this shape cannot be stored in this format, or None."""
        if in_features % group_size:
            return f"in_features {in_features} is not a multiple of group_size {group_size}"
        return self.reason(in_features, out_features, group_size)


def transposed(matrix: Tensor) -> Tensor:
    """Transposed copy with the strides of a fresh tensor.

    `.t().contiguous()` of one row copies nothing and keeps odd strides, which a view as bytes
    refuses.
    """
    return matrix.t().clone(memory_format=torch.contiguous_format)


def pack_words(nibbles: Tensor) -> Tensor:
    """[..., 8n] values 0 … 15 → int32 [..., n]; nibble i of a word holds value i."""
    values = nibbles.to(torch.uint8).reshape(*nibbles.shape[:-1], -1, 2)
    return (values[..., 0] | (values[..., 1] << 4)).contiguous().view(torch.int32)


def unpack_words(words: Tensor) -> Tensor:
    """int32 [..., n] → uint8 [..., 8n]; inverse of `pack_words`."""
    data = words.contiguous().view(torch.uint8)
    return torch.stack((data & 15, data >> 4), -1).flatten(-2)


def permute_blocks(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """Reorders every run of len(order) along the last axis: new[i] = old[order[i]]."""
    return values.unflatten(-1, (-1, len(order)))[..., list(order)].flatten(-2)


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """The order that undoes `permute_blocks(…, order)`."""
    return tuple(order.index(i) for i in range(len(order)))


ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds element ORDER[i] of its run of eight
INVERSE = inverse(ORDER)
