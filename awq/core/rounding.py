"""Rounding with error feedback (GPTQ, arXiv 2210.17323) under scales and zeros that are already
fixed.

Columns are rounded in order of falling activation; each column's error is pushed onto the columns
not yet rounded, so that the sum of outputs stays right. Scales and zeros are static, so the result
is an ordinary AWQ weight in natural order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from awq.backends import operator
from awq.core.team import ALONE, Team, present_team
from awq.core.weight import QuantizedWeight
from awq.errors import ConfigError, ModelError

DAMPING = 0.01
# tenfold each: beyond 1e10 of the mean, every matrix of finite numbers is its diagonal
MAX_DAMPINGS = 12
BLOCK = 128  # columns between two products with all the rest
COLUMNS = 512  # of a panel of a triangular matrix
FEW_PANELS = 4  # so few are not worth dividing between processes
_INVERTED = 2  # pieces of a panel's columns in an inversion


def feedback_factor(gram: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """Column order [in] and U [in, in] (float32, upper), UᵀU the inverse of the damped, ordered
    Gram matrix.

    Computed in float64; damping (a fraction of the mean diagonal, above 0) grows tenfold until the
    factorization succeeds. U is the inverse of R where G = R Rᵀ with R upper: one Cholesky
    factorization of the reversed matrix, and one triangular inverse.
    Raises ModelError when no damping helps: the matrix holds numbers that are not finite, or is
    none of squares.
    """
    if not 0 < damping < math.inf:
        raise ConfigError(f"damping is {damping!r}; give a finite number above 0.")

    diagonal = gram.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)

    # A dead input channel: any weight will do there; 1 keeps the matrix regular without moving the
    # others.
    mean = float(diagonal.double().where(diagonal != 0, 1.0).mean())
    panels = _damped_cholesky(gram, order.flip(0), damping * mean)
    if panels is None:
        raise ModelError(
            f"the Gram matrix of {len(order)} inputs cannot be factorized (mean square of an "
            f"input: {mean:g}); its activations "
            'are too large for float32. Quantize with rounding="nearest", or look for a norm with '
            "outsized weights."
        )

    _invert(panels, _team_for(panels))
    width = len(order)
    factor = torch.zeros_like(gram, memory_format=torch.contiguous_format)
    while panels:  # each is given up when its numbers are there
        panel = panels.pop()
        start = width - len(panel)
        stop = start + panel.shape[1]
        factor[: width - start, width - stop : width - start] = panel.flip(0, 1)

    return order, factor


# A lower triangular matrix as panels: some columns each, from their diagonal on. In float64 they
# take as much memory as the whole matrix does in float32, and not twice that.
Panels = list[Tensor]


def _damped_cholesky(gram: Tensor, order: Tensor, damping: float) -> Panels | None:
    """The lower factor, float64, of H + d·1 for the first d of damping, 11·damping, 111·damping, …
    that has one; None where none has. H: `gram` with rows and columns in `order`, 1 for dead
    channels.
    """
    if not all(bool(rows.isfinite().all()) for rows in gram.split(COLUMNS)):
        return None

    total = 0.0
    for power in range(MAX_DAMPINGS):
        total += damping * 10.0**power
        panels = _lower_panels(gram, order, total)
        if _factorize(panels, _team_for(panels)):
            return panels

    return None


def _lower_panels(gram: Tensor, order: Tensor, damping: float) -> Panels:
    """The lower half of H + damping · 1."""
    panels = []
    for start in range(0, len(order), COLUMNS):
        # Of a symmetric matrix columns are rows, which are read faster.
        rows = gram[order[start : start + COLUMNS]][:, order[start:]]
        panel = rows.t().to(torch.float64, memory_format=torch.contiguous_format)
        diagonal = panel.diagonal()
        diagonal[diagonal == 0] = 1.0
        diagonal += damping
        panels.append(panel)
    return panels


def _team_for(panels: Panels) -> Team:
    """The processes that divide the work on a matrix."""
    return present_team() if len(panels) > FEW_PANELS else ALONE


def _factorize(panels: Panels, team: Team) -> bool:
    """Replaces the lower half of a symmetric matrix by its Cholesky factor, in place; whether there
    is one. Each process finishes its own panels and hands them to the others."""
    failures = torch.zeros((), dtype=torch.int64, device=panels[0].device)
    for number, panel in enumerate(panels):
        width = panel.shape[1]
        own = panel[:width]
        below = panel[width:]
        if team.has(number):
            root, failed = torch.linalg.cholesky_ex(own)
            own.copy_(root)
            failures += failed != 0
            below.copy_(torch.linalg.solve_triangular(root.t(), below, upper=True, left=False))
        team.hand_out(panel, number)

        first = width
        for place, later in enumerate(panels[number + 1 :], number + 1):
            columns = panel[first : first + later.shape[1]]
            if team.has(place):
                later.addmm_(panel[first:], columns.t(), alpha=-1)
            first += len(columns)

    team.total(failures)
    return not bool(failures)


def _invert(panels: Panels, team: Team) -> None:
    """Inverts a lower triangular matrix in place, from its last panel on.

    The inverse of [[A, 0], [B, C]] is [[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]], and C⁻¹ is there already.
    Processes divide the columns of each panel.
    """
    for number in reversed(range(len(panels))):
        panel = panels[number]
        width = panel.shape[1]
        own = panel[:width]
        below = panel[width:]
        identity = torch.eye(width, dtype=panel.dtype, device=panel.device)
        inverse = torch.linalg.solve_triangular(own, identity, upper=False)
        product = below @ inverse  # B A⁻¹
        own.copy_(inverse)
        below.zero_()

        columns = -(-width // _INVERTED)
        for piece, start in enumerate(range(0, width, columns)):
            if team.has(piece):
                part = slice(start, start + columns)
                _subtract_product(below[:, part], panels[number + 1 :], product[:, part])
        team.total(below)


def _subtract_product(target: Tensor, lower: Panels, right: Tensor) -> None:
    """target [n, any] −= L · right for a lower triangular matrix L [n, n]."""
    first = 0
    for panel in lower:
        rows = right[first : first + panel.shape[1]]
        target[first:].addmm_(panel, rows, alpha=-1)
        first += len(rows)


def round_with_feedback(
    weight: Tensor,
    order: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int = 4,
) -> QuantizedWeight:
    """Codes for weight [out, in] under scale and zero [out, groups]; `order` and `factor` come from
    `feedback_factor`.

    Weights that read the same input share the factor: stack their rows and call once.
    """
    out, width = weight.shape
    group_of = (order // (width // scale.shape[1])).to(torch.int32)
    rest = weight.float()[:, order].t().contiguous()  # [in, out]: a column is a contiguous row here
    scales = scale.t().contiguous()
    zeros = zero.t().contiguous()
    codes = torch.empty(width, out, dtype=torch.uint8, device=weight.device)
    errors = torch.empty(BLOCK, out, dtype=torch.float32, device=weight.device)
    step = operator("round_block", weight.device, torch.float32) or _round_block

    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        step(rest, factor, scales, zeros, group_of, codes, errors, start, stop, 2**bits - 1)
        if stop < width:
            rest[stop:].addmm_(factor[start:stop, stop:].t(), errors[: stop - start], alpha=-1)

    natural = torch.empty_like(codes)
    natural[order] = codes

    return QuantizedWeight(natural.t().contiguous(), scale.half(), zero.to(torch.uint8), bits)


def _round_block(
    rest: Tensor,
    factor: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_of: Tensor,
    codes: Tensor,
    errors: Tensor,
    start: int,
    stop: int,
    top: int,
) -> None:
    """Rounds columns start … stop of `rest` [in, out] one after the other; fills their rows of
    codes [in, out], and errors."""
    block = rest[start:stop]
    u = factor[start:stop, start:stop]
    s = scales[group_of[start:stop]]
    z = zeros[group_of[start:stop]]
    diagonal = u.diagonal().tolist()

    for c in range(stop - start):
        code = (block[c] / s[c]).round_().add_(z[c]).clamp_(0, top)
        codes[start + c] = code
        torch.sub(block[c], code.sub_(z[c]).mul_(s[c]), out=errors[c])
        errors[c] /= diagonal[c]
        if c + 1 < stop - start:
            block[c + 1 :].addr_(u[c, c + 1 :], errors[c], alpha=-1)
