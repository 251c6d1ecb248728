"""Rounding with error feedback (GPTQ, arXiv 2210.17323) under scales and zeros that are already fixed.

Columns are rounded in order of falling activation; each column's error is pushed onto the columns not yet rounded, so that
the sum of outputs stays right. Scales and zeros are static, so the result is an ordinary AWQ weight in natural order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awq.core.weight import QuantizedWeight

DAMPING = 0.01
_BLOCK = 128


def feedback_factor(gram: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """Column order [in] and the upper Cholesky factor [in, in] (float32) of the inverse of the damped, ordered Gram matrix.

    Computed in float64; damping (a fraction of the mean diagonal) grows tenfold until the factorization succeeds.
    """
    diagonal = gram.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    H = gram[order][:, order].double()
    # A dead input channel: any weight will do there; 1 keeps the matrix regular without moving the others.
    H.diagonal()[H.diagonal() == 0] = 1.0
    mean = float(H.diagonal().mean())
    while True:
        damped = H.clone()
        damped.diagonal().add_(damping * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            factor, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(info) == 0:
                return order, factor.float()
        damping *= 10


def round_with_feedback(
    weight: Tensor, order: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, bits: int = 4
) -> QuantizedWeight:
    """Codes for weight [out, in] under scale and zero [out, groups]; `order` and `factor` come from `feedback_factor`."""
    out, width = weight.shape
    group_of = order // (width // scale.shape[1])
    rest = weight.float()[:, order].t().contiguous()  # [in, out]: a column is a contiguous row here
    scales, zeros = scale.t().contiguous()[group_of], zero.t().contiguous()[group_of]
    codes = torch.empty(width, out, dtype=torch.uint8, device=weight.device)
    top = 2**bits - 1
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        block, errors = rest[start:stop].clone(), torch.empty(stop - start, out, device=weight.device)
        u = factor[start:stop, start:stop]
        diagonal = u.diagonal().tolist()
        for c in range(stop - start):
            column, s, z = block[c], scales[start + c], zeros[start + c]
            code = (column / s).round_().add_(z).clamp_(0, top)
            codes[start + c] = code.to(torch.uint8)
            torch.sub(column, code.sub_(z).mul_(s), out=errors[c])
            errors[c] /= diagonal[c]
            if c + 1 < stop - start:
                block[c + 1 :].addr_(u[c, c + 1 :], errors[c], alpha=-1)
        if stop < width:
            rest[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    natural = torch.empty_like(codes)
    natural[order] = codes
    return QuantizedWeight(natural.t().contiguous(), scale.half(), zero.to(torch.uint8), bits)
