"""The operators of a mixture of experts in a decoder block, in plain torch: the specification of
the kernels.

    x, branch → add_norm_route → expert_parts → branch

What the branch holds are parts, [tokens, parts, width], which the next block adds up while it adds
them to the residual stream. How many parts there are is the backend's choice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.kernels.packed import Packed
from awq.kernels.reference.decode import ACTIVATIONS, add_norm
from awq.kernels.specs import Norm, Router


def route(x: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """(experts int32, their weights float32), both [tokens, top_k], the best first; x [tokens,
    features]."""
    logits = F.linear(x.float(), router.weight.float(), router.bias)
    score = logits.sigmoid() if router.sigmoid else logits.softmax(-1)
    choice = score if router.correction is None else score + router.correction
    if router.groups > 1:
        choice = _of_the_best_groups(choice, router)
    index = choice.topk(router.top_k, -1).indices
    weights = score.gather(-1, index)
    if router.normalized:
        weights = weights / weights.sum(-1, keepdim=True)

    return index.int(), weights * router.factor


def _of_the_best_groups(choice: Tensor, router: Router) -> Tensor:
    """choice [tokens, experts], −∞ for experts whose group is not among the best."""
    grouped = choice.unflatten(-1, (router.groups, -1))
    highest = grouped.topk(router.group_best, -1).values
    best = highest.sum(-1)
    kept = best.topk(router.kept, -1).indices

    outside = torch.ones_like(best, dtype=torch.bool)
    outside.scatter_(-1, kept, False)
    left = grouped.masked_fill(outside.unsqueeze(-1), -torch.inf)

    return left.flatten(-2)


def add_norm_route(
    x: Tensor, branch: Tensor | None, factor: float, norm: Norm | None, router: Router
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`add_norm`, and `route` of what it normalized, rows of all leading axes one after the
    other."""
    total, y = add_norm(x, branch, factor, norm)
    return total, y, *route(y.reshape(-1, y.shape[-1]), router)


def expert_parts(
    x: Tensor,
    first: Packed,
    second: Packed,
    biases: tuple[Tensor | None, Tensor | None],
    experts: Tensor,
    weights: Tensor,
    name: str,
    alternating: bool,
) -> Tensor:
    """What the chosen experts of each token give, weighted: [tokens, parts, hidden], whose sum over
    the parts is the mixture.

    x [tokens, hidden]; first, second: stacks of gate and up, and of down; biases [experts, out] of
    both. experts, weights: as `route` gives them. name: of the activation of gates. alternating:
    channels of gate and up take turns, instead of all gates and then all of up.
    """
    from awq.kernels.moe import moe_linear

    h = moe_linear(x, first, experts, None, biases[0])
    gate, up = (h[..., ::2], h[..., 1::2]) if alternating else h.chunk(2, -1)
    inner = (ACTIVATIONS[name](gate) * up).contiguous()

    return moe_linear(inner, second, experts, weights, biases[1]).unsqueeze(1)
