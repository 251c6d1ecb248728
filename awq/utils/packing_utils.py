"""AutoAWQ's helpers for gemm tensors, for software that unpacks checkpoints itself."""

from __future__ import annotations

import torch
from torch import Tensor

from awq.formats.base import INVERSE, permute_blocks, unpack_words


def unpack_awq(
    qweight: Tensor,
    qzeros: Tensor | None,
    bits: int = 4,
) -> tuple[Tensor, Tensor | None]:
    """Nibbles in storage order: int8 [in, out] and [groups, out]."""
    return unpack_words(qweight).to(torch.int8), None if qzeros is None else unpack_words(
        qzeros
    ).to(torch.int8)


def reverse_awq_order(
    iweights: Tensor,
    izeros: Tensor | None,
    bits: int = 4,
) -> tuple[Tensor, Tensor | None]:
    """Storage order → column order."""
    return permute_blocks(iweights, INVERSE), None if izeros is None else permute_blocks(
        izeros, INVERSE
    )


def dequantize_gemm(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
) -> Tensor:
    """Dense weight [in, out] in the dtype of `scales`."""
    codes, zeros = reverse_awq_order(*unpack_awq(qweight, qzeros, bits), bits)
    size = codes.shape[0] // scales.shape[0]
    return (codes - zeros.repeat_interleave(size, 0)) * scales.repeat_interleave(size, 0)  # type: ignore[union-attr]
