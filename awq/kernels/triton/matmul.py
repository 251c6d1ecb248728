"""Triton kernels on the planar layout (`awq.formats.planar`): the product for few tokens, the
reduction of its split sums included, and the dense weight for many tokens.

What decides their speed (figures: docs/kernels.md):

- Issue slots, not bytes. Codes become floats by their bits: a nibble or-ed into the mantissa of a
  power of two B is exactly B + q (B = 1024 for float16, 128 for bfloat16), and one fused
  multiply-add takes B + z away, exactly. In float16 the high
  nibble of a byte needs no shift: B + 16·q times 1/16 is B/16 + q (bfloat16 has too few bits for
  it). So a 32-bit word with 8 weights costs 4 `lop3`, 1 shift (3) and 4 multiply-adds of two
  weights each. Without inline assembly plain operators do the same.
- The weight is the left operand of the tensor cores, which may come from registers; tokens are the
right one.
- The scale multiplies the float32 sum of a group, not its weights; with many tokens (SCALE_WEIGHT)
it is the other way round.
- Scale and zero share one word of 32 bits, the shortest that an asynchronous copy takes: else every
step would wait for them.
- On GPUs with programmatic dependent launch (PDL) a kernel starts while the one before it ends, and
  fetches its first weights into the L2 cache, which is safe whatever that kernel writes, before it
  waits for the activations.
- K is split among SPLIT programs to fill the GPU. Each writes its float32 sum to `partial`; the
  last to arrive, by the `arrived` counter of its tile, adds all of them in the order of K, so the
  result does not depend on the order of arrival, and sets the counter back to 0.

Sizes are compile-time constants: they make loads 128 bits wide and masks vanish where there is no
tail.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from awq.kernels.triton.activations import activation

# Words of four codes → four planes q − z, two numbers in each register. $4: words; $5: −(B + z);
# $6, of float16: −(B/16 + z).
PLANES_OF_BFLOAT16 = tl.constexpr(
    """{.reg .b32 s4, s8, s12, one;
    mov.b32 one, 0x3f803f80;
    shr.u32 s4, $4, 4; shr.u32 s8, $4, 8; shr.u32 s12, $4, 12;
    lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xEA;
    lop3.b32 $1, s4, 0x000f000f, 0x43004300, 0xEA;
    lop3.b32 $2, s8, 0x000f000f, 0x43004300, 0xEA;
    lop3.b32 $3, s12, 0x000f000f, 0x43004300, 0xEA;
    fma.rn.bf16x2 $0, $0, one, $5;
    fma.rn.bf16x2 $1, $1, one, $5;
    fma.rn.bf16x2 $2, $2, one, $5;
    fma.rn.bf16x2 $3, $3, one, $5;}"""
)
PLANES_OF_FLOAT16 = tl.constexpr(
    """{.reg .b32 s8, one, part;
    mov.b32 one, 0x3c003c00; mov.b32 part, 0x2c002c00;
    shr.u32 s8, $4, 8;
    lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xEA;
    lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xEA;
    lop3.b32 $2, s8, 0x000f000f, 0x64006400, 0xEA;
    lop3.b32 $3, s8, 0x00f000f0, 0x64006400, 0xEA;
    fma.rn.f16x2 $0, $0, one, $5;
    fma.rn.f16x2 $1, $1, part, $6;
    fma.rn.f16x2 $2, $2, one, $5;
    fma.rn.f16x2 $3, $3, part, $6;}"""
)


@triton.jit
def _planes(words, zeros, ASM: tl.constexpr, BF16: tl.constexpr):
    """int16 words [rows, 32] and zeros (int16) [rows, 1] → four planes q − z [rows, 32] of float16
    or bfloat16, exact."""
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    BITS: tl.constexpr = 0x4300 if BF16 else 0x6400  # the power of two B
    B: tl.constexpr = 128.0 if BF16 else 1024.0
    if ASM:
        # −(B + z)
        low = tl.broadcast_to((zeros | (BITS - 0x8000)).to(dtype, bitcast=True), words.shape)
        if BF16:
            p0, p1, p2, p3 = tl.inline_asm_elementwise(
                PLANES_OF_BFLOAT16,
                "=&r,=&r,=&r,=&r,r,r",
                [words, low],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
        else:
            high = low + (B - B / 16)  # −(B/16 + z)
            p0, p1, p2, p3 = tl.inline_asm_elementwise(
                PLANES_OF_FLOAT16,
                "=&r,=&r,=&r,=&r,r,r,r",
                [words, low, high],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
    else:
        offset = (zeros | BITS).to(dtype, bitcast=True)
        p0 = ((words & 15) | BITS).to(dtype, bitcast=True) - offset
        p1 = (((words >> 4) & 15) | BITS).to(dtype, bitcast=True) - offset
        p2 = (((words >> 8) & 15) | BITS).to(dtype, bitcast=True) - offset
        p3 = (((words >> 12) & 15) | BITS).to(dtype, bitcast=True) - offset

    return p0, p1, p2, p3


@triton.jit
def _grid(words):
    """int32 words of the layout → zeros (int16) and scales (float16)."""
    return (words >> 16).to(tl.int16), words.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _group_of(t, J: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr):
    """Group of plane J of block t; the padding after K belongs to the last group, where x is 0."""
    if GROUP >= K:
        return t * 0

    group = (t * 128 + J * 32) // GROUP
    if K % 128 != 0:
        group = tl.minimum(group, K // GROUP - 1)
    return group


@triton.jit
def _tokens(x, m, k, M, K: tl.constexpr, TAIL: tl.constexpr):
    """x transposed [32, tokens] at inputs k; zeros outside."""
    mask = m[None, :] < M
    if TAIL:
        mask = mask & (k[:, None] < K)
    return tl.load(x + m[None, :].to(tl.int64) * K + k[:, None], mask=mask, other=0.0)


@triton.jit
def sum_of_slice(
    x,
    m,
    M,
    qweight,
    grid,
    row,
    slice,
    i,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    NP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALE_WEIGHT: tl.constexpr,
    ASM: tl.constexpr,
    BF16: tl.constexpr,
):
    """float32 [BN, BM]: rows `row` of the weight times rows m of x [M, K] (0 where m ≥ M) over one
    of SPLIT slices of K.

    i: 0 … 31, made by the caller: behind its wait for the kernel in front, the compiler would keep
    it apart.
    """
    STEPS: tl.constexpr = (K + 128 - 1) // 128
    PER: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    TAIL: tl.constexpr = K % 128 != 0 or STEPS % SPLIT != 0
    ONE_GROUP: tl.constexpr = GROUP >= K

    # scales looked up per block of 128
    PARTS: tl.constexpr = 1 if GROUP % 128 == 0 or ONE_GROUP else 4
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(PER):
        t = slice * PER + step
        k = t * 128 + i  # beyond the last block x is 0, and the last block's weights are read again
        if STEPS % SPLIT != 0:
            t = tl.minimum(t, STEPS - 1)

        words = tl.load(qweight + t * (NP * 32) + row[:, None] * 32 + i[None, :])
        if PARTS == 1:
            zero, scale = _grid(tl.load(grid + _group_of(t, 0, K, GROUP) * NP + row))
            p0, p1, p2, p3 = _planes(words, zero[:, None], ASM, BF16)
            if SCALE_WEIGHT:
                factor = scale[:, None].to(p0.dtype)
                acc = tl.dot(p0 * factor, _tokens(x, m, k, M, K, TAIL), acc)
                acc = tl.dot(p1 * factor, _tokens(x, m, k + 32, M, K, TAIL), acc)
                acc = tl.dot(p2 * factor, _tokens(x, m, k + 64, M, K, TAIL), acc)
                acc = tl.dot(p3 * factor, _tokens(x, m, k + 96, M, K, TAIL), acc)
            elif ONE_GROUP:
                acc = tl.dot(p0, _tokens(x, m, k, M, K, TAIL), acc)
                acc = tl.dot(p1, _tokens(x, m, k + 32, M, K, TAIL), acc)
                acc = tl.dot(p2, _tokens(x, m, k + 64, M, K, TAIL), acc)
                acc = tl.dot(p3, _tokens(x, m, k + 96, M, K, TAIL), acc)
            else:
                part = tl.dot(p0, _tokens(x, m, k, M, K, TAIL))
                part = tl.dot(p1, _tokens(x, m, k + 32, M, K, TAIL), part)
                part = tl.dot(p2, _tokens(x, m, k + 64, M, K, TAIL), part)
                part = tl.dot(p3, _tokens(x, m, k + 96, M, K, TAIL), part)
                acc += part * scale.to(tl.float32)[:, None]
        else:
            for j in tl.static_range(4):
                zero, scale = _grid(tl.load(grid + _group_of(t, j, K, GROUP) * NP + row))
                planes = _planes(words, zero[:, None], ASM, BF16)
                xj = _tokens(x, m, k + 32 * j, M, K, TAIL)
                if SCALE_WEIGHT:
                    acc = tl.dot(planes[j] * scale[:, None].to(planes[j].dtype), xj, acc)
                else:
                    acc += tl.dot(planes[j], xj) * scale.to(tl.float32)[:, None]

    if ONE_GROUP and not SCALE_WEIGHT:
        _, scale = _grid(tl.load(grid + row))
        acc *= scale.to(tl.float32)[:, None]

    return acc


@triton.jit
def _store(
    y,
    total,
    bias,
    first,
    n,
    m,
    M,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVE: tl.constexpr,
):
    """y at outputs n = first … of tokens m = float32 total [BN, BM] + bias; with GATED act(gate) ·
    up of it, half as many."""
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    dtype: tl.constexpr = y.dtype.element_ty
    if GATED == "":
        inside = (m[None, :] < M) & (n[:, None] < N)
        tl.store(y + m[None, :].to(tl.int64) * N + n[:, None], total.to(dtype), mask=inside)
    else:
        halves = tl.permute(
            total.to(dtype).to(tl.float32).reshape(BN // (2 * INTERLEAVE), 2, INTERLEAVE, BM),
            (0, 2, 3, 1),
        )
        gate, up = tl.split(halves)  # rounded to y's dtype, as they would be stored
        value = (activation(gate, GATED).to(dtype).to(tl.float32) * up).reshape(BN // 2, BM)
        half = first // 2 + tl.arange(0, BN // 2)
        inside = (m[None, :] < M) & (half[:, None] < N // 2)
        tl.store(
            y + m[None, :].to(tl.int64) * (N // 2) + half[:, None], value.to(dtype), mask=inside
        )


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    x,
    qweight,
    grid,
    bias,
    y,
    partial,
    arrived,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    NP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALE_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
    AHEAD: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVE: tl.constexpr,
):
    """y [M, N] = x [M, K] · weightᵀ + bias. NP: rows of the padded weight. Grid: (⌈N/BN⌉, SPLIT,
    ⌈M/BM⌉).

    GATED: an activation's name, or "". With one, y [M, N/2] = act(gate) · up, for a weight with
    INTERLEAVE rows of the gate and INTERLEAVE of up in turn.
    AHEAD: steps whose weights are fetched into the L2 cache before the wait for the kernel in front
    (a power of two, or 0).

    partial float32 [SPLIT, M, N] and arrived int32 [⌈M/BM⌉ · ⌈N/BN⌉] are used when SPLIT > 1.
    """
    BF16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    STEPS: tl.constexpr = (K + 128 - 1) // 128
    PER: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    tile = tl.program_id(0)
    slice = tl.program_id(1)
    block = tl.program_id(2)
    n = tile * BN + tl.arange(0, BN)
    row = n
    if NP % BN != 0:
        row = tl.minimum(n, NP - 1)

    m = block * BM + tl.arange(0, BM)
    i = tl.arange(0, 32)
    if PDL:
        gdc_launch_dependents()
        if AHEAD > 0:
            steps = tl.minimum(slice * PER + tl.arange(0, AHEAD), STEPS - 1).to(tl.int64)
            lines = tl.minimum(tile * BN * 64 + tl.arange(0, BN // 2) * 128, NP * 64 - 128)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
                "=r,l",
                [
                    qweight.to(tl.pointer_type(tl.int8))
                    + steps[:, None] * (NP * 64)
                    + lines[None, :]
                ],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )

        gdc_wait()

    acc = sum_of_slice(
        x, m, M, qweight, grid, row, slice, i, K, GROUP, NP, BM, BN, SPLIT, SCALE_WEIGHT, ASM, BF16
    )
    if SPLIT > 1:
        inside = (m[None, :] < M) & (n[:, None] < N)
        where = m[None, :].to(tl.int64) * N + n[:, None]
        plane = M.to(tl.int64) * N
        tl.store(partial + slice * plane + where, acc, mask=inside)
        tl.debug_barrier()  # every thread's sums before the release by one of them
        counter = arrived + block * tl.num_programs(0) + tile

        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1:
            total = tl.zeros((BN, BM), tl.float32)
            for s in tl.static_range(SPLIT):
                part = partial + s * plane + where
                total += tl.load(part, mask=inside, other=0.0, cache_modifier=".cg")

            _store(y, total, bias, tile * BN, n, m, M, N, BM, BN, HAS_BIAS, GATED, INTERLEAVE)
            tl.store(counter, 0)
    else:
        _store(y, acc, bias, tile * BN, n, m, M, N, BM, BN, HAS_BIAS, GATED, INTERLEAVE)


@triton.jit(do_not_specialize=["first", "N"])
def dequantize_kernel(
    qweight,
    grid,
    dense,
    first,
    N,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    NP: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """dense [N − first, K] (any float dtype) = rows first … N of the weight, rounded once. Grid:
    (⌈(N − first)/BN⌉, ⌈K/128⌉)."""
    tile = tl.program_id(0)
    t = tl.program_id(1)
    local = tile * BN + tl.arange(0, BN)
    n = first + local
    row = tl.minimum(n, NP - 1)
    i = tl.arange(0, 32)
    words = tl.load(qweight + t * (NP * 32) + row[:, None] * 32 + i[None, :])
    if PDL:
        gdc_wait()  # the kernel in front may still read what is written here
    for j in tl.static_range(4):
        zero, scale = _grid(tl.load(grid + _group_of(t, j, K, GROUP) * NP + row))
        step = ((words >> (4 * j)) & 15) - zero[:, None]
        k = t * 128 + 32 * j + i
        mask = n[:, None] < N
        if K % 128 != 0:
            mask = mask & (k[None, :] < K)

        value = step.to(tl.float32) * scale.to(tl.float32)[:, None]
        tl.store(
            dense + local[:, None].to(tl.int64) * K + k[None, :],
            value.to(dense.dtype.element_ty),
            mask=mask,
        )
