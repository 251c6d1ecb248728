"""Search of the activation-aware scales (arXiv 2306.00978, eq. 4–5) through the Gram matrix.

‖X(Ŵ − W)ᵀ‖² = tr(Δ G Δᵀ) with G = XᵀX: after G is gathered once, a candidate costs one
fake-quantize and one product with G, whatever the number of calibration tokens. Every linear that
reads the same input is judged together, because they share s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from awq.backends import operator
from awq.core.team import present_team
from awq.core.weight import fake_quantize, group_range, grouped, scale_and_zero

# weights quantized at once: a CPU's cache, a GPU's occupancy
_TOGETHER = {"cpu": 1 << 19, "cuda": 1 << 25}
_OPERANDS = torch.bfloat16  # of the kernel's product
_PARTS = 8  # blocks of columns in a product that leaves out what lies below G's diagonal
_SMALLEST = 64  # columns in a block
_ROWS = 512  # of a Gram matrix that are prepared at once
RATIOS = tuple(k / 20 for k in range(21))


class ScaleChoice(NamedTuple):
    """scale: float32 [in]; ratio and kind ("identity", "activation", "duo") name the candidate;
    losses share one unit."""

    scale: Tensor
    ratio: float
    kind: str
    loss: float
    identity_loss: float


def weight_importance(weight: Tensor, group_size: int) -> Tensor:
    """Mean over rows of |w| / (largest |w| of its group): [out, in] → [in] (the paper's s_W, as
    AutoAWQ ships it)."""
    groups = grouped(weight.abs(), group_size)
    return (groups / (groups.amax(-1, keepdim=True) + 1e-6)).view(weight.shape).mean(0)


def scale_candidates(
    x_mean: Tensor,
    w_mean: Tensor,
    duo: bool = True,
) -> tuple[list[tuple[str, float]], Tensor]:
    """Every candidate's (kind, ratio), identity first, and its s: float32 [n, in]. Channels never
    active keep 1.

    activation: s = x̄^r; duo: s = x̄^r / (w̄^(1−r) + 1e-4); both divided by sqrt(max·min), r = 0,
    0.05 … 1.
    """
    names, one = [("identity", 0.0)], torch.ones_like(x_mean).unsqueeze(0)
    active = x_mean > 0
    if not active.any():
        return names, one

    x = x_mean.clamp(min=1e-4 * float(x_mean[active].mean()))
    ratios = torch.tensor(RATIOS, dtype=torch.float32, device=x.device).unsqueeze(1)
    by_activation = x**ratios
    forms = [by_activation[1:]]  # ratio 0 is the identity again
    names += [("activation", ratio) for ratio in RATIOS[1:]]

    if duo:
        forms.append(by_activation / (w_mean ** (1 - ratios) + 1e-4))
        names += [("duo", ratio) for ratio in RATIOS]

    s = torch.cat(forms).clamp_(min=1e-4)
    highest = s.where(active, -torch.inf).amax(1, keepdim=True)
    s /= (highest * s.where(active, torch.inf).amin(1, keepdim=True)).sqrt()

    return names, torch.cat([one, s.where(active, 1.0)])


def row_losses(delta: Tensor, gram: Tensor) -> Tensor:
    """diag(Δ G Δᵀ): squared output error of each row, summed over tokens. delta [out, in], gram
    [in, in] → [out].

    G is symmetric: what is above its diagonal counts twice and what is below is not read, which is
    half of the work.
    """
    width = delta.shape[1]
    columns = max(_SMALLEST, -(-width // _PARTS))
    total = torch.zeros(len(delta), dtype=torch.float32, device=delta.device)

    for start in range(0, width, columns):
        own = delta[:, start : start + columns]
        product = own @ gram[start : start + columns, start : start + columns]
        if start:
            product.addmm_(delta[:, :start], gram[:start, start : start + columns], alpha=2)
        total += product.mul_(own).sum(-1)

    return total


def gram_loss(delta: Tensor, gram: Tensor) -> Tensor:
    """tr(Δ G Δᵀ): squared output error, summed over tokens and outputs; a tensor, so that a GPU is
    not waited for."""
    return row_losses(delta, gram).sum()


def search_scale(
    weight: Tensor,
    gram: Tensor,
    x_mean: Tensor,
    group_size: int,
    bits: int = 4,
    zero_point: bool = True,
    duo: bool = True,
    tie: Callable[[Tensor], Tensor] = lambda s: s,
) -> ScaleChoice:
    """The best s [in] for the stacked weights [sum of out, in] of the linears that share one input.

    gram: float32 [in, in], Σ x xᵀ over tokens; x_mean: mean |x| per channel [in].
    tie: makes s [n, in] equal where channels share one producing row (grouped-query attention).
    Candidates are judged by tr(Δ G Δᵀ), Δ = Q(W s)/s − W.
    A candidate whose loss is not finite is dropped. Deterministic: the first of equal candidates
    wins.
    """
    names, scales = scale_candidates(x_mean, weight_importance(weight, group_size), duo)
    scales = tie(scales)
    losses = _losses(weight, gram, scales, group_size, bits, zero_point).tolist()

    # NaN last, then the first of equals
    best = min(range(len(losses)), key=lambda i: (losses[i] != losses[i], losses[i], i))
    kind, ratio = names[best]

    return ScaleChoice(scales[best], ratio, kind, losses[best], losses[0])


def _losses(
    weight: Tensor,
    gram: Tensor,
    scales: Tensor,
    group_size: int,
    bits: int,
    zero_point: bool,
) -> Tensor:
    """tr(Δ G Δᵀ) [n], Δ = Q(W s)/s − W, for scales [n, in], by a kernel where there is one.

    The kernel multiplies in bfloat16: on SmolLM2 every group chose the same candidate as in float32
    (docs/notes/quality.md).
    """
    limit, width = _TOGETHER.get(weight.device.type, _TOGETHER["cuda"]), weight.shape[1]
    scaled_losses = operator("scaled_losses", weight.device, weight.dtype)
    if scaled_losses is not None:
        rows, upper = weight.contiguous(), _upper_half(gram)
        parts = scales.contiguous().split(max(1, limit // weight.numel()))
        losses = _by_parts(
            parts, lambda part: scaled_losses(rows, upper, part, group_size, bits, zero_point)
        )
        if losses is not None:
            return losses

    total = torch.zeros(len(scales), dtype=torch.float32, device=weight.device)
    for rows in weight.split(max(1, limit // width)):
        parts = scales.split(max(1, limit // rows.numel()))
        losses = _by_parts(
            parts, lambda part: _gram_losses(rows, gram, part, group_size, bits, zero_point)
        )
        assert losses is not None
        total += losses

    return total


def _by_parts(parts: Sequence[Tensor], losses: Callable[[Tensor], Any]) -> Tensor | None:
    """The losses of all candidates, a part of them at a time; None where they cannot be had."""
    team = present_team()
    first = losses(parts[0])  # by every process: all must know whether there are any
    if first is None:
        return None

    found = first.new_zeros(sum(map(len, parts)))
    for number, place in enumerate(found.split([len(part) for part in parts])):
        if team.has(number):
            place.copy_(first if number == 0 else losses(parts[number]))

    team.total(found)
    return found


def _upper_half(gram: Tensor) -> Tensor:
    """The diagonal of a Gram matrix [in, in] and twice what is above it, rounded for the kernel.

    Row by row: a copy in float32 would take 3.3 GB for 28,672 inputs.
    """
    upper = torch.empty(gram.shape, dtype=_OPERANDS, device=gram.device)
    for start in range(0, len(gram), _ROWS):
        rows = gram[start : start + _ROWS]
        upper[start : start + _ROWS] = rows.triu(start) + rows.triu(start + 1)
    return upper


def _gram_losses(
    weight: Tensor,
    gram: Tensor,
    scales: Tensor,
    group_size: int,
    bits: int,
    zero_point: bool,
) -> Tensor:
    """tr(Δ G Δᵀ), Δ = Q(W s)/s − W, for several s [n, in] at once: their weights are quantized as
    rows of one [n·out, in]."""
    scaled = (weight * scales.unsqueeze(1)).view(-1, weight.shape[1])
    quantized = fake_quantize(
        scaled,
        *scale_and_zero(*group_range(scaled, group_size, zero_point), bits, zero_point),
        bits,
    )
    delta = quantized.view(len(scales), *weight.shape).div_(scales.unsqueeze(1)).sub_(weight)

    return row_losses(delta.view(scaled.shape), gram).view(len(scales), -1).sum(1)
