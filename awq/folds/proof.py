"""Proof of folds by experiment: random scales are folded into a copy of the block, and nothing it
computes may change.

Compared are the block's output *and* every consumer's own output: a few massive channels in the
residual stream of a trained model would hide an error of one linear in the output alone. Outputs
are filed under the module's name, never by position: in parallel blocks linears run in another
order than the one they are grouped in.

The random scales come from a generator that the caller hands in, so that a proof gives the same
answer twice and never touches torch's global random state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from awq.folds.fold import Fold, InputGroup, apply_fold, row_divisor
from awq.nn.block_calls import BlockCall
from awq.nn.blocks import float_copy
from awq.nn.hooks import hooked

TOLERANCE = 1e-4  # relative, float32
LOWEST_SCALE, HIGHEST_SCALE = 0.5, 2.0  # of the random scales
Calls = Sequence[tuple[BlockCall, Tensor]]
# module name ("" is the block) → its outputs in order of execution
Outputs = dict[str, list[Tensor]]


def float_calls(calls: Calls) -> Calls:
    """The calls with every floating tensor in float32, so that 16-bit models are judged in
    float32."""
    return [(call.to(hidden.device, torch.float32), hidden.float()) for call, hidden in calls]


def outputs_of(block: nn.Module, names: Sequence[str], calls: Calls) -> Outputs:
    """The named modules' outputs and the block's own, over all calls. A module that is never called
    has no entry."""
    outputs: Outputs = {}

    def note(name: str, output: Any) -> None:
        outputs.setdefault(name, []).append(_values(output).detach().clone())

    with hooked(block, names, after=note):
        for call, hidden in calls:
            for value in _floating(call.outputs(block, hidden)):  # some hand on more than one
                note("", value)

    return outputs


def _values(output: Any) -> Tensor:
    """The first floating tensor of an output: routers give several, their logits or weights among
    them."""
    return next(_floating(output))


def _floating(output: Any) -> Iterator[Tensor]:
    """The floating tensors of an output, nested ones included."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _floating(value)


def largest_change(
    before: Mapping[str, Sequence[Tensor]], after: Mapping[str, Sequence[Tensor]]
) -> float:
    """Largest ‖after − before‖ / ‖before‖ over the outputs; inf when something is not finite or
    differs in number or shape."""
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
def holds(
    block: nn.Module,
    groups: Sequence[InputGroup],
    calls: Calls,
    generator: torch.Generator | None = None,
) -> float:
    """Largest change when all folds of `groups` are applied together with random s in [0.5, 2],
    tied as they ask.

    Changes the block while it runs and puts it back afterwards; meant for a float32 copy.
    generator: of the random scales, on the CPU; default: a new one with seed 0.
    """
    generator = generator or torch.Generator().manual_seed(0)
    folds = [(group.fold, group.in_features) for group in groups if group.fold is not None]
    consumers = [name for fold, _ in folds for name in fold.consumers]
    producers = [fold.producer for fold, _ in folds]
    before = outputs_of(block, consumers, calls)
    device = before[""][0].device

    divisors: dict[str, Tensor] = {}  # of the rows of linear producers
    with restored(block, [*consumers, *producers]):
        for fold, in_features in folds:
            scale = _random_scale(fold, in_features, generator, device)
            apply_fold(block, fold, scale)
            if fold.kind == "linear":
                divisor = row_divisor(block, fold, scale)
                divisors[fold.producer] = divisors.get(fold.producer, 1.0) * divisor
        after = outputs_of(block, consumers, calls)

    # A producer that is itself a consumer (v reads the norm, o reads v) gives its output divided,
    # on purpose.
    for name in divisors.keys() & after.keys():
        after[name] = [output * divisors[name] for output in after[name]]
    return largest_change(before, after)


def _random_scale(
    fold: Fold,
    in_features: int,
    generator: torch.Generator,
    device: torch.device,
) -> Tensor:
    spread = HIGHEST_SCALE - LOWEST_SCALE
    scale = (
        torch.rand(in_features, generator=generator, dtype=torch.float32) * spread + LOWEST_SCALE
    )
    return fold.tie(scale.to(device))


@torch.no_grad()
def prove(
    block: nn.Module,
    groups: Sequence[InputGroup],
    calls: Calls,
    generator: torch.Generator | None = None,
) -> list[InputGroup]:
    """The groups with every fold that does not preserve this block's function removed and named in
    `reason`.

    calls: (arguments, hidden states) of the block on a few tokens. The block itself is not touched.
    generator: see `holds`.
    """
    if not any(group.fold for group in groups):
        return list(groups)

    generator = generator or torch.Generator().manual_seed(0)
    probe = float_copy(block)
    calls = float_calls(calls)
    if holds(probe, groups, calls, generator) <= TOLERANCE:
        return list(groups)

    alone = [_without_false_fold(group, [], probe, calls, generator) for group in groups]
    kept: list[InputGroup] = []
    for group in alone:  # folds that hold alone but not together: the earlier one stays
        others = [other for other in kept if other.fold]
        kept.append(
            _without_false_fold(group, others, probe, calls, generator) if others else group
        )

    return kept


def _without_false_fold(
    group: InputGroup,
    others: list[InputGroup],
    probe: nn.Module,
    calls: Calls,
    generator: torch.Generator,
) -> InputGroup:
    """The group, without its fold if that changes the block beside the folds of the others."""
    if group.fold is None:
        return group

    change = holds(probe, [*others, group], calls, generator)
    if change <= TOLERANCE:
        return group
    return replace(
        group,
        fold=None,
        reason=f"fold into {group.fold.producer} changes the block by {change:.1e}",
    )
