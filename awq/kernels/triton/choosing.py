"""Triton kernel of a greedy choice: the likeliest token of each row, whether the row has ended, and
the places where the next step and the host look."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOWEST = tl.constexpr(-(1 << 63))


@triton.jit
def _ranked(value, place):
    """int64 that orders as torch's argmax does: numbers that are no numbers above all others, of
    equals the first. value: float32."""
    # −0 becomes 0; the bits of what is negative order the other way round
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(value == value, key, 0x7FFFFFFF)
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)


@triton.jit(do_not_specialize=["batch", "vocabulary"])
def choose_token_kernel(
    logits,
    ids,
    going,
    found,
    ends,
    padding,
    best,
    arrived,
    batch,
    vocabulary,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ENDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """ids int64 [batch] of logits float32 [batch, vocabulary]; going bool [batch] and found int64
    [batch + 1] anew. Grid: (⌈vocabulary/BLOCK⌉, batch).

    ends int64 [ENDS], padding int64 [1], of which numbers below 0 stand for none. best int64
    [batch], `LOWEST` before and after; arrived int32 [1], 0 before and after. ROWS: a power of two
    from the batch up.
    """
    part, row = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    place = part * BLOCK + tl.arange(0, BLOCK)
    start = logits + row.to(tl.int64) * vocabulary
    value = tl.load(start + place, mask=place < vocabulary, other=-float("inf"))
    tl.atomic_max(best + row, tl.max(_ranked(value, place), 0), sem="relaxed")
    tl.debug_barrier()
    programs = tl.num_programs(0) * tl.num_programs(1)
    if tl.atomic_add(arrived, 1, sem="acq_rel") == programs - 1:
        r, e = tl.arange(0, ROWS), tl.arange(0, ENDS)
        inside = r < batch
        ranked = tl.load(best + r, mask=inside, other=0, cache_modifier=".cg")
        likeliest = 0x7FFFFFFF - (ranked & 0xFFFFFFFF)
        goes = tl.load(going + r, mask=inside, other=0) != 0
        pad = tl.load(padding)
        token = tl.where(goes | (pad < 0), likeliest, pad)
        ended = tl.max((token[:, None] == tl.load(ends + e)[None, :]).to(tl.int32), 1) > 0
        goes = goes & (ended == 0)
        tl.store(ids + r, token, mask=inside)
        tl.store(going + r, goes, mask=inside)
        tl.store(found + r, token, mask=inside)
        tl.store(found + batch, tl.max((goes & inside).to(tl.int64), 0))
        tl.store(best + r, tl.full((ROWS,), LOWEST, tl.int64), mask=inside)
        tl.store(arrived, 0)
