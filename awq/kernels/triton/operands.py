"""What the kernels of `direct` share: layouts, weights as the left operands of tensor cores,
inputs, and their product. See there."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from awq.kernels.triton.matmul import PLANES_OF_BFLOAT16, PLANES_OF_FLOAT16


@constexpr_function
def sums_of(warps):
    """Where sums [blocks, rows, 8] are: blocks among the warps."""
    return gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])


@constexpr_function
def left_of(warps):
    """Where planes [blocks, rows, 32] are: 16 bytes of a row in a thread."""
    return gl.DotOperandLayout(0, sums_of(warps), 8)


@constexpr_function
def right_of(warps):
    """Where inputs [blocks, 32, 8] are."""
    return gl.DotOperandLayout(1, sums_of(warps), 8)


@constexpr_function
def inputs_of(warps):
    """Where inputs [blocks, 128] are when they come from memory."""
    return gl.BlockedLayout([1, 8], [2, 16], [warps, 1], [1, 0])


@constexpr_function
def vector_of(warps, together):
    """Where outputs are, so many together in a thread."""
    return gl.BlockedLayout([together], [32], [warps], [0])


@constexpr_function
def shared_rows():
    """Inputs in shared memory, row by row."""
    return gl.SwizzledSharedLayout(1, 1, 1, [1, 0])


@gluon.jit
def planes_of(words, zeros, BF16: gl.constexpr):
    """int16 words [blocks, rows, 32] and zeros (int16) [blocks, rows, 1] → four planes q − z of
    float16 or bfloat16; see `matmul._planes`."""
    if BF16:
        low = (zeros | (0x4300 - 0x8000)).to(gl.bfloat16, bitcast=True)
        low, words = gl.broadcast(low, words)
        p0, p1, p2, p3 = gl.inline_asm_elementwise(
            PLANES_OF_BFLOAT16,
            "=&r,=&r,=&r,=&r,r,r",
            [words, low],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        low = (zeros | (0x6400 - 0x8000)).to(gl.float16, bitcast=True)
        high = low + 960.0  # −(B/16 + z)
        low, words = gl.broadcast(low, words)
        high, words = gl.broadcast(high, words)
        p0, p1, p2, p3 = gl.inline_asm_elementwise(
            PLANES_OF_FLOAT16,
            "=&r,=&r,=&r,=&r,r,r,r",
            [words, low, high],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
            is_pure=True,
            pack=2,
        )
    return p0, p1, p2, p3


@gluon.jit
def rows_of(
    j,
    tile,
    N: gl.constexpr,
    NP: gl.constexpr,
    BN: gl.constexpr,
    GATED: gl.constexpr,
    RUN: gl.constexpr,
):
    """Rows of the weight for places j = 0 … BN − 1 of a tile; with an activation gate and up in
    turn."""
    if GATED == "" or RUN == 1:
        row = tile * BN + j
    else:
        channel = tile * (BN // 2) + j // 2
        if RUN == 0:
            row = channel + (j % 2) * (N // 2)
        else:
            row = (channel // RUN) * (2 * RUN) + channel % RUN + (j % 2) * RUN
    return gl.minimum(row, NP - 1)


@gluon.jit
def weights_of(
    qweight,
    grid,
    tile,
    N: gl.constexpr,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    NP: gl.constexpr,
    TP: gl.constexpr,
    BN: gl.constexpr,
    GATED: gl.constexpr,
    RUN: gl.constexpr,
    WARPS: gl.constexpr,
):
    """(words [TP, BN, 32] as left operands, scales and zeros [TP, BN] beside them, the same beside
    the sums)."""
    SUMS: gl.constexpr = sums_of(WARPS)
    LEFT: gl.constexpr = left_of(WARPS)
    STEPS: gl.constexpr = (K + 127) // 128
    t = gl.minimum(gl.arange(0, TP, layout=gl.SliceLayout(1, gl.SliceLayout(2, LEFT))), STEPS - 1)
    j = gl.arange(0, BN, layout=gl.SliceLayout(0, gl.SliceLayout(2, LEFT)))
    i = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, LEFT)))
    row = rows_of(j, tile, N, NP, BN, GATED, RUN)
    block = gl.expand_dims(gl.expand_dims(t, 1), 2) * (NP * 32)
    place = gl.expand_dims(gl.expand_dims(row, 0), 2) * 32
    words = gl.load(qweight + (block + place + gl.expand_dims(gl.expand_dims(i, 0), 1)))
    t_sum = gl.arange(0, TP, layout=gl.SliceLayout(1, gl.SliceLayout(2, SUMS)))
    t_sum = gl.minimum(t_sum, STEPS - 1)
    j_sum = gl.arange(0, BN, layout=gl.SliceLayout(0, gl.SliceLayout(2, SUMS)))
    row_sum = rows_of(j_sum, tile, N, NP, BN, GATED, RUN)
    # one group beyond the last input stands for the whole row
    WIDE: gl.constexpr = TP if GROUP >= K else GROUP // 128
    corner = gl.expand_dims(t // WIDE, 1) * NP + gl.expand_dims(row, 0)
    corner_sum = gl.expand_dims(t_sum // WIDE, 1) * NP + gl.expand_dims(row_sum, 0)
    return words, gl.load(grid + corner), gl.load(grid + corner_sum)


@gluon.jit
def inputs_at(token, K: gl.constexpr, TP: gl.constexpr, WARPS: gl.constexpr):
    """The inputs at `token` [TP, 128], zeros beyond K."""
    IN: gl.constexpr = inputs_of(WARPS)
    t = gl.arange(0, TP, layout=gl.SliceLayout(1, IN))
    i = gl.arange(0, 128, layout=gl.SliceLayout(0, IN))
    k = gl.expand_dims(t, 1) * 128 + gl.expand_dims(i, 0)
    if TP * 128 != K:
        x = gl.load(token + k, mask=k < K, other=0.0)
    else:
        x = gl.load(token + k)
    return x


@gluon.jit
def sum_of(
    inputs,
    words,
    grid,
    scale,
    TP: gl.constexpr,
    BN: gl.constexpr,
    WARPS: gl.constexpr,
):
    """float32 [BN]: what is held times inputs [TP, 128]. scale: float32 [TP, BN]."""
    SUMS: gl.constexpr = sums_of(WARPS)
    RIGHT: gl.constexpr = right_of(WARPS)
    ONE: gl.constexpr = gl.SliceLayout(2, RIGHT)
    PLAIN: gl.constexpr = shared_rows()
    dtype: gl.constexpr = inputs.dtype
    x = gl.allocate_shared_memory(dtype, [TP, 128], PLAIN, inputs)
    zeros = gl.expand_dims((grid >> 16).to(gl.int16), 2)
    p0, p1, p2, p3 = planes_of(words, zeros, dtype == gl.bfloat16)
    columns = gl.full([TP, 32, 8], 0.0, dtype, RIGHT)
    sums = gl.full([TP, BN, 8], 0.0, gl.float32, SUMS)
    x0, columns = gl.broadcast(gl.expand_dims(x.slice(0, 32, 1).load(ONE), 2), columns)
    sums = mma_v2(p0, x0, sums)
    x1, columns = gl.broadcast(gl.expand_dims(x.slice(32, 32, 1).load(ONE), 2), columns)
    sums = mma_v2(p1, x1, sums)
    x2, columns = gl.broadcast(gl.expand_dims(x.slice(64, 32, 1).load(ONE), 2), columns)
    sums = mma_v2(p2, x2, sums)
    x3, columns = gl.broadcast(gl.expand_dims(x.slice(96, 32, 1).load(ONE), 2), columns)
    sums = mma_v2(p3, x3, sums)
    sums = gl.sum(sums * gl.expand_dims(scale, 2), 0)
    total = 0.125 * gl.sum(sums, 1)  # of eight equal columns
    return gl.convert_layout(total, vector_of(WARPS, 2))


@gluon.jit
def scale_of(grid):
    """Scales float32 of words of the layout."""
    return grid.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
