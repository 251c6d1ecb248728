"""Discovery of folds on the model itself, without a table of architectures.

A scale can move out of a linear's columns into whatever produces its input, if nothing else reads
that input. Two kinds of producers are looked for:

- *Norms* are found by identity: the tensor that a group of linears reads *is* a norm's output.
  Weights may be stored as w or as w − 1 (gemma); both kinds are tried.
- *Linears* (v → o, up → down, the v rows of a fused projection) are found by probing sequences of
  one token: the softmax over a single key is 1, so attention passes values through unmixed, and
  queries and keys have no say. Multiplying a producer's rows by known factors shows which row feeds
  which channel, in two forwards: separate, fused, interleaved and grouped-query layouts alike. Each
  row's position is written as two digits; the first forward multiplies row i by a factor that tells
  its high digit, the second by one that tells its low digit, and the ratio of each channel gives
  them back.

What is found here is a guess until `prove` has confirmed it on longer sequences, where attention
does mix tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from awq.folds.fold import Fold, InputGroup, linear_names, reader_names
from awq.folds.proof import TOLERANCE, Calls, float_calls, holds
from awq.nn.blocks import float_copy
from awq.nn.experts import expert_of
from awq.nn.hooks import hooked, input_of
from awq.nn.surgery import get_weight, is_linear, linear_shape

MAX_CHANNELS_PER_ROW = 64  # that one row may feed: query heads per key-value head
LOWEST_FACTOR, FACTOR_RANGE = 1.25, 1.5  # of the probes: digits are spread over 1.25 … 2.75
_MAX_CHANNEL_ERROR = 1e-3  # relative, for a channel to count as multiplied by one factor
_MAX_DIGIT_ERROR = 0.1  # of a digit that was read back


@torch.no_grad()
def discover(
    block: nn.Module,
    one_token: Calls,
    many: Calls,
    generator: torch.Generator | None = None,
) -> list[InputGroup]:
    """Every linear of the block exactly once, grouped by the tensor it reads, in order of
    execution, with its fold if any.

    one_token: calls on sequences of a single token; the first of several has few of them, enough to
    show most wrong guesses. many: calls on a few longer sequences. generator: of the random scales
    on which guesses are tried (see `holds`). Works on a float32 copy; the block itself is not
    touched.
    """
    generator = generator or torch.Generator().manual_seed(0)
    probe = float_copy(block)
    one_token = float_calls(one_token)
    many = float_calls(many)
    groups, norms = _input_groups(probe, many)
    order = [name for group in groups for name in group.consumers]

    def is_true(fold: Fold, group: InputGroup) -> bool:
        return holds(probe, [replace(group, fold=fold)], many, generator) <= TOLERANCE

    found = []
    for group in groups:
        fold = _norm_fold(group, norms.get(group.consumers[0], []), is_true)
        fold = fold or _linear_fold(probe, group, order, one_token, is_true)
        reason = "" if fold else "no norm or linear feeds these channels alone"
        found.append(replace(group, fold=fold, reason=reason))

    unused = [name for name in linear_names(block) if name not in order]
    return found + [_unused_group(block, name) for name in unused]


def _unused_group(block: nn.Module, name: str) -> InputGroup:
    in_features, _ = linear_shape(block.get_submodule(name))
    return InputGroup((name,), in_features, None, "not called during calibration")


def _input_groups(block: nn.Module, calls: Calls) -> tuple[list[InputGroup], dict[str, list[str]]]:
    """Groups of linears by the tensor they read, and for each group's first linear the norms whose
    output that tensor is."""
    inputs: dict[str, tuple] = {}
    outputs: dict[str, tuple] = {}

    # a storage that lives cannot be reused, so its address names the tensor
    alive: list[Tensor] = []

    def reads(name: str, args: tuple) -> None:
        fits = (
            bool(args)
            and isinstance(args[0], Tensor)
            and args[0].shape[-1] == linear_shape(block.get_submodule(name))[0]
        )
        if fits and name not in inputs:
            inputs[name] = _identity(args[0])
            alive.append(args[0])

    def writes(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs[name] = _identity(output)
            alive.append(output)

    with (
        hooked(block, reader_names(block), before=reads),
        hooked(block, _norm_names(block), after=writes),
    ):
        call, hidden = calls[0]
        call.run(block, hidden)

    members: dict[tuple, list[str]] = {}
    for name, key in inputs.items():
        members.setdefault(key, []).append(name)
    linears = set(linear_names(block))
    members = {key: names for key, names in members.items() if linears.intersection(names)}
    groups = [InputGroup(tuple(names), width) for (_, width), names in members.items()]
    widths = {name: block.get_parameter(f"{name}.weight").numel() for name in outputs}

    feeding = {}
    for key, names in members.items():
        feeding[names[0]] = [
            norm for norm, output in outputs.items() if output == key and widths[norm] == key[1]
        ]

    return groups, feeding


def _norm_names(block: nn.Module) -> list[str]:
    """Modules with a parameter `weight` of one dimension: norms, and whatever else scales
    channels."""
    weights = {
        name: module._parameters.get("weight") for name, module in block.named_modules() if name
    }
    return [name for name, weight in weights.items() if weight is not None and weight.dim() == 1]


def _identity(tensor: Tensor) -> tuple[int, int]:
    """(address, width). Views that only reshape the tokens keep this identity."""
    return tensor.data_ptr(), tensor.shape[-1]


def _norm_fold(
    group: InputGroup,
    norms: list[str],
    is_true: Callable[[Fold, InputGroup], bool],
) -> Fold | None:
    for norm in norms:
        for kind in ("norm", "norm_plus_one"):
            fold = Fold(group.consumers, norm, kind)  # type: ignore[arg-type]
            if is_true(fold, group):
                return fold
    return None


def _linear_fold(
    block: nn.Module,
    group: InputGroup,
    order: list[str],
    one_token: Calls,
    is_true: Callable[[Fold, InputGroup], bool],
) -> Fold | None:
    """The nearest earlier linear whose rows feed the group's channels one by one."""
    looks = _looks(block, group.consumers[0], one_token)
    if not looks:
        return None

    earlier = order[: order.index(group.consumers[0])]
    expert = expert_of(block, group.consumers[0])
    if expert is not None:  # nothing outside an expert feeds its second product
        earlier = [name for name in earlier if expert_of(block, name) == expert]
    for producer in reversed(earlier):
        if not is_linear(block.get_submodule(producer)):
            continue  # a router: what it gives is a choice
        for subset in _row_subsets(get_weight(block.get_submodule(producer)).shape[0]):
            if len(subset) * MAX_CHANNELS_PER_ROW < group.in_features:
                continue

            rows = None
            for calls, reference in looks:
                rows = _map_rows(block, producer, subset, group, reference, calls)
                if rows is None:  # what few tokens refute is not tried on all
                    break

            if rows is None:
                continue

            fold = Fold(group.consumers, producer, "linear", rows)
            if is_true(fold, group):
                return fold

    return None


def _looks(block: nn.Module, consumer: str, one_token: Calls) -> list[tuple[Calls, Tensor]]:
    """(calls, the consumer's input in them) of the first call alone, where that has any, and of
    all."""
    found = []
    for calls in (one_token[:1], one_token) if len(one_token) > 1 else (one_token,):
        reference = _tokens_of(block, consumer, calls)
        if reference is not None and bool(reference.any()):
            found.append((calls, reference))
    return found


def _row_subsets(rows: int) -> Iterator[Tensor]:
    """Row sets that may feed a group alone: all, halves, thirds, even and odd rows (fused gate and
    up projections)."""
    index = torch.arange(rows)
    yield index

    for count in (2, 3):
        if rows % count == 0:
            parts = index.view(count, -1).unbind(0)
            yield from reversed(parts)

    if rows % 2 == 0:
        yield index[1::2]
        yield index[0::2]


def _map_rows(
    block: nn.Module,
    producer: str,
    subset: Tensor,
    group: InputGroup,
    reference: Tensor,
    one_token: Calls,
) -> Tensor | None:
    """Row of `producer` that multiplies each channel of the group's input, int64 [in]; None when
    some live channel has none.

    subset: int64, the rows that are tried. reference: the group's input [tokens, in] as it is.
    """
    rows = get_weight(block.get_submodule(producer)).shape[0]
    base = int(len(subset) ** 0.5) + 1
    live = reference.norm(dim=0) > 0
    place = torch.arange(len(subset))
    position = torch.zeros(group.in_features, dtype=torch.long, device=reference.device)

    for digit in (place // base, place % base):
        factor = torch.ones(rows, dtype=torch.float32)
        factor[subset] = LOWEST_FACTOR + FACTOR_RANGE * digit.float() / base
        changed = _tokens_of(
            block, group.consumers[0], one_token, producer, factor.to(reference.device)
        )
        if changed is None or changed.shape != reference.shape:
            return None

        level, clean = _read_digit(changed, reference, base)
        if not (clean | ~live).all():
            return None
        position = position * base + level.clamp(0, base - 1)

    if (position[live] >= len(subset)).any():
        return None

    found = subset.to(reference.device)[position.clamp(max=len(subset) - 1)]
    return torch.where(live, found, torch.full_like(found, -1))


def _read_digit(changed: Tensor, reference: Tensor, base: int) -> tuple[Tensor, Tensor]:
    """(digit, whether it is one) of each channel, from inputs [tokens, in] with and without the
    factors."""
    energy = reference.pow(2).sum(0)
    ratio = (changed * reference).sum(0) / energy.clamp(min=1e-30)
    rest = changed - ratio * reference
    size = changed.norm(dim=0).clamp(min=1e-30)
    is_multiple = rest.norm(dim=0) < _MAX_CHANNEL_ERROR * size
    level = (ratio - LOWEST_FACTOR) / FACTOR_RANGE * base
    digit = level.round()
    is_digit = (level - digit).abs() < _MAX_DIGIT_ERROR
    is_digit &= digit >= 0

    return digit.long(), is_multiple & is_digit


def _tokens_of(
    block: nn.Module,
    consumer: str,
    calls: Calls,
    producer: str = "",
    factor: Tensor | None = None,
) -> Tensor | None:
    """The consumer's input [tokens, in], while the producer's output channels are multiplied by a
    factor [rows], if given."""

    def multiply(_name: str, output: Tensor) -> Tensor:
        return output if factor is None else output * factor

    found = []
    with hooked(block, [] if factor is None else [producer], after=multiply):
        for call, hidden in calls:
            tokens = input_of(block, consumer, partial(call.run, block, hidden))
            if tokens is not None:
                found.append(tokens.detach().reshape(-1, tokens.shape[-1]).clone())

    return torch.cat(found) if found else None
