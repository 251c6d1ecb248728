"""What an item of a product works on, whichever unit multiplies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from awq.kernels.cpu.emit import Emitter
from awq.kernels.cpu.encoder.phase import Phase
from awq.kernels.cpu.ir_types import F32, LANES, vec
from awq.kernels.cpu.values import Pointer, Value

BLOCK = LANES  # outputs of a block of the layout rows16
PAIR = 2 * BLOCK  # outputs of an item of a product


class Product(NamedTuple):
    """One of a layer's products. name: of its weights' fields; output: of the job's field for y
    [tokens, outputs]."""

    name: str
    inputs: int
    outputs: int
    output: str

    @property
    def pairs(self) -> int:
        return -(-self.outputs // PAIR)


class Operands(NamedTuple):
    """Where an item's weights lie, and its outputs of token 0; `begin` to `end`: its tokens."""

    codes: Pointer
    scales: Pointer
    zeros: Pointer
    bias: Pointer
    y: Pointer
    pair: Value
    begin: Value
    end: Value

    @classmethod
    def of_item(
        cls, p: Phase, index: Value, product: Product, piece_tokens: int | Value
    ) -> Operands:
        """Items with the same tokens follow each other."""
        inputs = product.inputs
        grid = inputs // p.spec.group * BLOCK
        piece = index // product.pairs
        pair = index % product.pairs
        block = pair * 2
        begin = piece * piece_tokens

        return cls(
            codes=_field(p, product, "codes") + block * (inputs * BLOCK // 2),
            scales=_field(p, product, "scales") + block * grid,
            zeros=_field(p, product, "zeros") + block * grid,
            bias=_field(p, product, "bias") + block * BLOCK,
            y=getattr(p.t, product.output) + block * BLOCK,
            pair=pair,
            begin=begin,
            end=p.b.smaller(begin + piece_tokens, p.t.tokens),
        )


def _field(p: Phase, product: Product, name: str) -> Pointer:
    return getattr(p.layer, f"{product.name}_{name}")


def joined_digits(b: Emitter, sums: Sequence[Value]) -> Value:
    """The sums of an activation's digits, the highest first, as one float32 [16].

    Two of them fit an int32: a group has at most 256 inputs.
    """
    whole = sums[0]
    for digit in sums[1:2]:
        whole = (whole << 8) + digit

    value = b.signed_to_float(whole, vec(F32))
    for digit in sums[2:]:
        value = b.fma(value, b.const(vec(F32), 256.0), b.signed_to_float(digit, vec(F32)))

    return value
