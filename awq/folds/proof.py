"""Proof of folds by experiment: random scales are folded into a copy of the block, and nothing it computes may change.

Compared are the block's output *and* every consumer's own output: a few massive channels in the residual stream of a trained
model would hide an error of one linear in the output alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from awq.folds.fold import Fold, InputGroup, apply_fold, hook_all
from awq.nn.blocks import BlockCall

TOLERANCE = 1e-4  # relative, float32
Calls = Sequence[tuple[BlockCall, Tensor]]


def float_copy(block: nn.Module) -> nn.Module:
    """A float32 copy of a block to experiment on."""
    return copy.deepcopy(block).float().eval()


def outputs_of(block: nn.Module, names: Sequence[str], calls: Calls) -> list[Tensor]:
    """The named modules' outputs and the block's own, over all calls."""
    seen: list[Tensor] = []

    def make(_name: str):
        return lambda _m, _a, out: seen.append(out.detach().clone())

    handles = hook_all(block, names, make)
    try:
        for call, hidden in calls:
            seen.append(call.run(block, hidden).detach().clone())
    finally:
        for handle in handles:
            handle.remove()
    return seen


def largest_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Largest ‖after − before‖ / ‖before‖ over the outputs; inf when something is not finite or differs in shape."""
    if len(before) != len(after) or any(a.shape != b.shape for a, b in zip(after, before)):
        return float("inf")
    errors = [float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-20)) for a, b in zip(after, before)]
    return max((e if e == e else float("inf") for e in errors), default=0.0)


def random_scale(fold: Fold, in_features: int, device: torch.device) -> Tensor:
    """Random s in [0.5, 2], tied as the fold asks."""
    return fold.tie((torch.rand(in_features) * 1.5 + 0.5).to(device))


@torch.no_grad()
def holds(block: nn.Module, groups: Sequence[InputGroup], calls: Calls) -> float:
    """Largest change when all folds of `groups` are applied to a copy of the block with random scales."""
    folded = float_copy(block)
    names = [n for g in groups if g.fold for n in g.consumers]
    before = outputs_of(folded, names, calls)
    device = next(folded.parameters()).device
    for group in groups:
        if group.fold is not None:
            apply_fold(folded, group.fold, random_scale(group.fold, group.in_features, device))
    # A producer that is itself a consumer of another fold (v reads the norm, o reads v) changes its own output on purpose.
    producers = {g.fold.producer for g in groups if g.fold}
    after = outputs_of(folded, names, calls)
    per_call = len(before) // len(calls)
    fixed = [i for i in range(len(before)) if i % per_call == per_call - 1 or names[i % per_call] not in producers]
    return largest_change([before[i] for i in fixed], [after[i] for i in fixed])


@torch.no_grad()
def prove(block: nn.Module, groups: Sequence[InputGroup], calls: Calls) -> list[InputGroup]:
    """The groups with every fold that does not preserve this block's function removed and named in `reason`.

    calls: (arguments, hidden states) of the block on a few tokens. The block itself is not touched.
    """
    if not any(g.fold for g in groups) or holds(block, groups, calls) <= TOLERANCE:
        return list(groups)
    proven: list[InputGroup] = []
    for group in groups:
        change = holds(block, [group], calls) if group.fold else 0.0
        proven.append(group if change <= TOLERANCE else _dropped(group, change))
    kept: list[InputGroup] = []
    for group in proven:
        # Folds that hold alone but not together: keep the earlier one.
        together = [*kept, group]
        change = holds(block, together, calls) if group.fold and any(g.fold for g in kept) else 0.0
        kept.append(group if change <= TOLERANCE else _dropped(group, change))
    return kept


def _dropped(group: InputGroup, change: float) -> InputGroup:
    producer = group.fold.producer if group.fold else "none"
    return replace(group, fold=None, reason=f"fold into {producer} changes the block by {change:.1e}")
