"""How kinds of CPU multiply bytes.

The kernels are written for vectors of 16 lanes of 32 bits, and LLVM splits them where registers are shorter. Only the product
of bytes has no portable spelling that every version of LLVM turns into the right instruction.
"""

from __future__ import annotations

from typing import Any, NamedTuple

LANES = 16


class Target(NamedTuple):
    """One kind of CPU, and the tile that fits its registers.

    features: what LLVM calls the instructions needed, all of them. step: intrinsics, applied one after the other. lanes: int32
    lanes that they work on. rows: blocks of 16 outputs that share one pass over the inputs of several tokens. sums: sums of int32
    [16] that fit the registers: rows · tokens · planes.
    """

    name: str
    features: tuple[str, ...]
    step: tuple[str, ...]
    lanes: int
    rows: int
    sums: int

    def dot(self, b: Any, total: Any, codes: Any, values: Any) -> Any:
        """total int32 [16] + codes int8 [64] (0 … 15) · values int8 [64], four neighbours into each lane. b: an `Emitter`."""
        if self.lanes == LANES:
            return _step(b, self.step, total, codes, values)
        n = self.lanes
        parts = [(b.slice(total, i, n), b.slice(codes, 4 * i, 4 * n), b.slice(values, 4 * i, 4 * n)) for i in range(0, LANES, n)]
        return b.joined([_step(b, self.step, *part) for part in parts])


def _step(b: Any, names: tuple[str, ...], total: Any, codes: Any, values: Any) -> Any:
    from awq.kernels.cpu.emit import I16, const, vec

    if len(names) == 1 and "aarch64" in names[0]:
        return b.intrinsic(names[0], total.type, [total, codes, values])
    if len(names) == 1:
        return b.intrinsic(names[0], total.type, [total, b.bitcast(codes, total.type), b.bitcast(values, total.type)])
    # Pairs of bytes to int16 (at most 2 · 15 · 128, which fits), pairs of those to int32.
    words = vec(I16, codes.type.count // 2)
    return b.add(total, b.intrinsic(names[1], total.type, [b.intrinsic(names[0], words, [codes, values]), const(words, 1)]))


TARGETS = (
    Target("avx512vnni", ("avx512vnni", "avx512bw", "avx512vl"), ("llvm.x86.avx512.vpdpbusd.512",), 16, 2, 16),
    Target("avx512bw", ("avx512bw", "avx512vl"), ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"), 16, 2, 16),
    Target("avxvnni", ("avxvnni", "avx2", "fma", "f16c"), ("llvm.x86.avx512.vpdpbusd.256",), 8, 1, 4),
    Target("avx2", ("avx2", "fma", "f16c"), ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"), 8, 1, 4),
    Target("dotprod", ("dotprod",), ("llvm.aarch64.neon.sdot.v4i32.v16i8",), 4, 1, 4),
)
