"""Refinement of codes and scales that are already good: coordinate descent, and least squares, on
tr(Δ G Δᵀ).

Error feedback decides every column once, before it knows what the later ones do. Coordinate descent
visits the columns again and moves each code to the best value given all others; the best scales for
given codes solve a small linear system per row. Neither can raise the loss (but for scales being
stored in float16), and the format does not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awq.backends import operator
from awq.core.rounding import BLOCK
from awq.core.weight import QuantizedWeight, storable_scale

_RIDGE = 1e-3  # pull towards the old scales, as a fraction of the system's mean diagonal
# entries of the systems solved at once
SYSTEMS = {"cpu": 1 << 21, "cuda": 1 << 26}


def refine(
    weight: Tensor,
    gram: Tensor,
    quantized: QuantizedWeight,
    rounds: int,
) -> QuantizedWeight:
    """`rounds` times two sweeps of coordinate descent and new scales, then a last sweep.

    weight: float32 [out, in]; gram: float32 [in, in].
    """
    for _ in range(rounds):
        quantized = refit_scales(weight, gram, descend(weight, gram, quantized, 2))
    return descend(weight, gram, quantized, 1) if rounds else quantized


def descend(
    weight: Tensor,
    gram: Tensor,
    quantized: QuantizedWeight,
    sweeps: int,
) -> QuantizedWeight:
    """Cyclic coordinate descent on the codes: each one moves to its best value given all others,
    column by column."""
    codes = quantized.codes.t().contiguous()  # [in, out]: a column is a contiguous row here
    scales = quantized.scales.float().t().contiguous()
    zeros = quantized.zeros.float().t().contiguous()
    diagonal = gram.diagonal().clone()

    # a dead channel has no slope either: its code stays
    gram.diagonal()[diagonal == 0] = 1.0
    width, out = codes.shape
    slope = gram @ (quantized.dequantize() - weight).t()  # half the gradient of the loss, [in, out]
    moves = torch.empty(min(BLOCK, width), out, dtype=torch.float32, device=weight.device)
    step = operator("descend_block", weight.device, torch.float32) or _descend_block
    new_codes = torch.empty_like(codes)

    for _ in range(sweeps):
        for start in range(0, width, BLOCK):
            stop = min(start + BLOCK, width)
            step(
                slope,
                gram,
                scales,
                zeros,
                codes,
                new_codes,
                moves,
                start,
                stop,
                2**quantized.bits - 1,
            )
            slope.addmm_(gram[:, start:stop], moves[: stop - start])
        codes, new_codes = new_codes, codes

    gram.diagonal().copy_(diagonal)  # a copy of the whole would be 3.3 GB for 28,672 inputs
    return quantized._replace(codes=codes.t().contiguous())


def lean_of(weight: Tensor, gram: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Where coordinate descent would put each weight if it had not to be a code, given all others:
    the distance from its code [out, in] in steps, within a half where descent has ended."""
    pivots = gram.diagonal().clone()
    pivots[pivots == 0] = 1.0  # a dead channel has no slope either
    wanted = ((weight - quantized.dequantize()) @ gram).div_(pivots)
    by_group = wanted.view(*quantized.scales.shape, -1)
    return by_group.div_(quantized.scales.float().unsqueeze(-1)).view(weight.shape)


def _descend_block(
    slope: Tensor,
    gram: Tensor,
    scales: Tensor,
    zeros: Tensor,
    codes: Tensor,
    new_codes: Tensor,
    moves: Tensor,
    start: int,
    stop: int,
    top: int,
) -> None:
    """New codes of columns start … stop, one after the other, and their moves [columns, out]; the
    rest is only read."""
    group_size = len(codes) // len(scales)
    local = slope[start:stop].clone()
    g = gram[start:stop, start:stop]
    pivots = g.diagonal().tolist()

    for c in range(stop - start):
        s = scales[(start + c) // group_size]
        z = zeros[(start + c) // group_size]
        code = codes[start + c].float()
        new = (code - z).sub_(local[c] / (s * pivots[c])).round_().add_(z).clamp_(0, top)
        new_codes[start + c] = new
        torch.mul(new.sub_(code), s, out=moves[c])
        if c + 1 < stop - start:
            local[c + 1 :].addr_(g[c, c + 1 :], moves[c])


def refit_scales(weight: Tensor, gram: Tensor, quantized: QuantizedWeight) -> QuantizedWeight:
    """The scales that minimise tr(Δ G Δᵀ) for given codes, with a ridge towards the old ones.

    Per row, with c = codes − zeros: Σ_h (c_g G_gh c_hᵀ) s_h = (w G)_g c_gᵀ.
    """
    groups = quantized.scales.shape[1]
    entries = SYSTEMS["cpu" if weight.device.type == "cpu" else "cuda"]
    rows = max(1, entries // groups**2)
    target = weight @ gram
    scales = [
        _refit_rows(part, gram, QuantizedWeight(codes, old, zeros, quantized.bits))
        for part, codes, old, zeros in zip(*(t.split(rows) for t in (target, *quantized[:3])))
    ]

    return quantized._replace(scales=torch.cat(scales))


def _refit_rows(target: Tensor, gram: Tensor, quantized: QuantizedWeight) -> Tensor:
    """New scales float16 [out, groups] of some rows; target: their weight @ gram [out, in]."""
    size = quantized.group_size
    old = quantized.scales.float()
    steps = quantized.steps().float()

    def group_sums(values: Tensor) -> Tensor:
        return values.view(*old.shape, size).sum(-1)

    systems = torch.empty(*old.shape, old.shape[1], dtype=torch.float32, device=gram.device)
    for g, own_steps in enumerate(steps.split(size, 1)):
        rows_of_gram = gram[g * size : (g + 1) * size]
        systems[:, g] = group_sums((own_steps @ rows_of_gram).mul_(steps))

    reached = (systems @ old.unsqueeze(-1)).squeeze(-1)
    missing = group_sums(target * steps) - reached
    systems = systems.double()
    change = _solved(systems, missing.double()).float()
    wanted = (old + change).nan_to_num(0.0)

    return storable_scale(wanted.clamp(min=0.3 * old, max=3 * old)).half()


def _solved(systems: Tensor, values: Tensor) -> Tensor:
    """x [out, groups] of systems [out, groups, groups] · x = values, with a ridge that is written
    into the systems."""
    diagonal = systems.diagonal(dim1=1, dim2=2)
    diagonal.add_(_RIDGE * diagonal.mean(-1, keepdim=True) + 1e-30)
    return torch.linalg.solve(systems, values.unsqueeze(-1)).squeeze(-1)
