"""Proof of folds by experiment: random scales are folded into a copy of the block, and nothing it computes may change.

Compared are the block's output *and* every consumer's own output: a few massive channels in the residual stream of a trained
model would hide an error of one linear in the output alone. Outputs are filed under the module's name, never by position:
in parallel blocks linears run in another order than the one they are grouped in.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from awq.folds.fold import InputGroup, apply_fold, hook_all, row_divisor
from awq.nn.blocks import BlockCall

TOLERANCE = 1e-4  # relative, float32
Calls = Sequence[tuple[BlockCall, Tensor]]
Outputs = dict[str, list[Tensor]]  # module name ("" is the block) → its outputs in order of execution


def float_copy(block: nn.Module) -> nn.Module:
    """A float32 copy of a block to experiment on."""
    return copy.deepcopy(block).float().eval()


def float_calls(calls: Calls) -> Calls:
    """The calls with every floating tensor in float32, so that 16-bit models are judged in float32."""
    return [(call.to(hidden.device, torch.float32), hidden.float()) for call, hidden in calls]


def outputs_of(block: nn.Module, names: Sequence[str], calls: Calls) -> Outputs:
    """The named modules' outputs and the block's own, over all calls. A module that is never called has no entry."""
    seen: Outputs = {}

    def make(name: str):
        return lambda _m, _a, out: seen.setdefault(name, []).append(_values(out).detach().clone())

    handles = hook_all(block, names, make)
    try:
        for call, hidden in calls:
            seen.setdefault("", []).append(call.run(block, hidden).detach().clone())
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _values(output: Any) -> Tensor:
    """The first floating tensor of an output: routers give several, their logits or weights among them."""
    if isinstance(output, Tensor):
        return output
    return next(value for value in output if isinstance(value, Tensor) and value.is_floating_point())


def largest_change(before: Mapping[str, Sequence[Tensor]], after: Mapping[str, Sequence[Tensor]]) -> float:
    """Largest ‖after − before‖ / ‖before‖ over the outputs; inf when something is not finite or differs in number or shape."""
    if before.keys() != after.keys():
        return float("inf")
    worst = 0.0
    for name, old in before.items():
        new = after[name]
        if len(old) != len(new) or any(a.shape != b.shape for a, b in zip(new, old)):
            return float("inf")
        for a, b in zip(new, old):
            error = float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-20))
            worst = max(worst, error if error == error else float("inf"))
    return worst


@contextmanager
def restored(block: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Puts the named modules' own parameters back, bit for bit, on leaving."""
    parameters = {p for name in names for p in block.get_submodule(name).parameters(recurse=False)}
    saved = [(p, p.detach().clone()) for p in parameters]
    try:
        yield
    finally:
        for parameter, old in saved:
            parameter.data.copy_(old)


@torch.no_grad()
def holds(block: nn.Module, groups: Sequence[InputGroup], calls: Calls) -> float:
    """Largest change when all folds of `groups` are applied together with random s in [0.5, 2], tied as they ask.

    Changes the block while it runs and puts it back afterwards; meant for a float32 copy.
    """
    folds = [(g.fold, g.in_features) for g in groups if g.fold is not None]
    names = [n for fold, _ in folds for n in fold.consumers]
    before = outputs_of(block, names, calls)
    undo: dict[str, Tensor] = {}
    with restored(block, [*names, *(fold.producer for fold, _ in folds)]):
        for fold, in_features in folds:
            scale = (torch.rand(in_features) * 1.5 + 0.5).to(before[""][0].device)
            scale = fold.tie(scale)
            apply_fold(block, fold, scale)
            if fold.kind == "linear":
                divisor = row_divisor(block, fold, scale)
                undo[fold.producer] = undo[fold.producer] * divisor if fold.producer in undo else divisor
        after = outputs_of(block, names, calls)
    # A producer that is itself a consumer (v reads the norm, o reads v) gives its output divided, on purpose.
    for name in undo.keys() & after.keys():
        after[name] = [out * undo[name] for out in after[name]]
    return largest_change(before, after)


@torch.no_grad()
def prove(block: nn.Module, groups: Sequence[InputGroup], calls: Calls) -> list[InputGroup]:
    """The groups with every fold that does not preserve this block's function removed and named in `reason`.

    calls: (arguments, hidden states) of the block on a few tokens. The block itself is not touched.
    """
    if not any(g.fold for g in groups):
        return list(groups)
    probe, calls = float_copy(block), float_calls(calls)
    if holds(probe, groups, calls) <= TOLERANCE:
        return list(groups)
    alone = [_judged(g, holds(probe, [g], calls) if g.fold else 0.0) for g in groups]
    kept: list[InputGroup] = []
    for group in alone:  # folds that hold alone but not together: the earlier one stays
        together = bool(group.fold) and any(g.fold for g in kept)
        kept.append(_judged(group, holds(probe, [*kept, group], calls) if together else 0.0))
    return kept


def _judged(group: InputGroup, change: float) -> InputGroup:
    if group.fold is None or change <= TOLERANCE:
        return group
    return replace(group, fold=None, reason=f"fold into {group.fold.producer} changes the block by {change:.1e}")
