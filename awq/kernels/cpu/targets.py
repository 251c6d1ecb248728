"""How kinds of CPU multiply bytes.

The kernels are written for vectors of 16 lanes of 32 bits, and LLVM splits them where registers are
shorter. Only the product of bytes has no portable spelling that every version of LLVM turns into
the right instruction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from awq.kernels.cpu.emit import Emitter
    from awq.kernels.cpu.values import Value

LANES = 16
_PAIRS = 16  # bits of the sum of two products of bytes


class Target(NamedTuple):
    """One kind of CPU, and the tile that fits its registers.

    features: what LLVM calls the instructions needed, all of them. step: intrinsics, applied one
    after the other. lanes: int32
    lanes that they work on. rows: blocks of 16 outputs that share one pass over the inputs of
    several tokens. sums: sums of int32
    [16] that fit the registers: rows · tokens · planes.
    """

    name: str
    features: tuple[str, ...]
    step: tuple[str, ...]
    lanes: int
    rows: int
    sums: int

    def dot(self, b: Emitter, total: Value, codes: Value, values: Value) -> Value:
        """total int32 [16] + codes int8 [64] (0 … 15) · values int8 [64], four neighbours into each
        lane."""
        if self.lanes == LANES:
            return self._step(b, total, codes, values)

        n = self.lanes
        parts = []
        for i in range(0, LANES, n):
            own = (
                b.slice(total, i, n),
                b.slice(codes, 4 * i, 4 * n),
                b.slice(values, 4 * i, 4 * n),
            )
            parts.append(own)

        return b.joined([self._step(b, *part) for part in parts])

    def _step(self, b: Emitter, total: Value, codes: Value, values: Value) -> Value:
        if len(self.step) == 1:
            (name,) = self.step
            operands = [codes, values]
            if "aarch64" not in name:
                operands = [b.bitcast(operand, total.type) for operand in operands]
            return b.intrinsic(name, total.type, [total, *operands])

        # Pairs of bytes to int16 (at most 2 · 15 · 128, which fits), pairs of those to int32.
        multiply_bytes, multiply_pairs = self.step
        int16 = b.integers(_PAIRS, 2 * total.type.count)
        pairs = b.intrinsic(multiply_bytes, int16, [codes, values])
        ones = b.const(pairs.type, 1)

        return total + b.intrinsic(multiply_pairs, total.type, [pairs, ones])


TARGETS = (
    Target(
        "avx512vnni",
        ("avx512vnni", "avx512bw", "avx512vl"),
        ("llvm.x86.avx512.vpdpbusd.512",),
        16,
        2,
        16,
    ),
    Target(
        "avx512bw",
        ("avx512bw", "avx512vl"),
        ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
        16,
        2,
        16,
    ),
    Target(
        "avxvnni", ("avxvnni", "avx2", "fma", "f16c"), ("llvm.x86.avx512.vpdpbusd.256",), 8, 1, 4
    ),
    Target(
        "avx2",
        ("avx2", "fma", "f16c"),
        ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
        8,
        1,
        4,
    ),
    Target("dotprod", ("dotprod",), ("llvm.aarch64.neon.sdot.v4i32.v16i8",), 4, 1, 4),
)
