"""Discovery of folds on the model itself, without a table of architectures.

Norms are found by identity: the tensor that a group of linears reads *is* a norm's output. Linear producers (v → o, up → down,
the v rows of any fused projection) are found by probing sequences of one token: the softmax over a single key is 1, so
attention passes values through unmixed and queries and keys have no say. Multiplying a producer's rows by known factors
then shows, in two forwards, which row feeds which channel: separate, fused, interleaved and grouped-query layouts alike.
What is found here is a guess until `prove` has confirmed it on longer sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from awq.folds.fold import Fold, InputGroup, hook_all, linear_names, reader_names
from awq.folds.proof import TOLERANCE, Calls, float_calls, float_copy, holds
from awq.nn.surgery import get_weight, is_linear, linear_shape


class _Reached(Exception):
    """Raised by a hook once the tensor of interest exists: the rest of the block need not run."""


@torch.no_grad()
def discover(block: nn.Module, one_token: Calls, many: Calls) -> list[InputGroup]:
    """Every linear of the block exactly once, grouped by the tensor it reads, in order of execution, with its fold if any.

    one_token: calls on sequences of a single token (a batch of many); many: calls on a few longer sequences.
    Works on a float32 copy; the block itself is not touched.
    """
    probe, one_token, many = float_copy(block), float_calls(one_token), float_calls(many)
    groups, norms = _input_groups(probe, many)
    order = [name for group in groups for name in group.consumers]
    found = []
    for group in groups:
        fold = _norm_fold(probe, group, norms.get(group.consumers[0], []), many)
        fold = fold or _linear_fold(probe, group, order, one_token, many)
        reason = "" if fold else "no norm or linear feeds these channels alone"
        found.append(replace(group, fold=fold, reason=reason))
    unused = [n for n in linear_names(block) if n not in order]
    return found + [
        InputGroup((n,), linear_shape(block.get_submodule(n))[0], None, "not called during calibration") for n in unused
    ]


def _input_groups(block: nn.Module, calls: Calls) -> tuple[list[InputGroup], dict[str, list[str]]]:
    """Groups of linears by the tensor they read, and for each group's first linear the norms whose output that tensor is."""
    inputs: dict[str, tuple] = {}
    outputs: dict[str, tuple] = {}
    alive: list[Tensor] = []  # a storage that lives cannot be reused, so its address names the tensor
    readers = reader_names(block)
    norms = [n for n, m in block.named_modules() if n and isinstance(getattr(m, "weight", None), Tensor) and m.weight.dim() == 1]

    def reads(name: str):
        def hook(_module, args):
            fits = args and isinstance(args[0], Tensor) and args[0].shape[-1] == linear_shape(_module)[0]
            if fits and name not in inputs:
                inputs[name] = _identity(args[0])
                alive.append(args[0])

        return hook

    def writes(name: str):
        def hook(_module, _args, out):
            if isinstance(out, Tensor):
                outputs[name] = _identity(out)
                alive.append(out)

        return hook

    handles = hook_all(block, readers, reads, pre=True) + hook_all(block, norms, writes)
    try:
        call, hidden = calls[0]
        call.run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    members: dict[tuple, list[str]] = {}
    for name, key in inputs.items():
        members.setdefault(key, []).append(name)
    linears = set(linear_names(block))
    members = {key: names for key, names in members.items() if linears.intersection(names)}
    groups = [InputGroup(tuple(names), key[1]) for key, names in members.items()]
    widths = {n: block.get_parameter(f"{n}.weight").numel() for n in outputs}
    feeding = {names[0]: [n for n, out in outputs.items() if out == key and widths[n] == key[1]] for key, names in members.items()}
    return groups, feeding


def _identity(tensor: Tensor) -> tuple[int, int]:
    """Views that only reshape the tokens keep this identity."""
    return tensor.data_ptr(), tensor.shape[-1]


def _norm_fold(block: nn.Module, group: InputGroup, norms: list[str], many: Calls) -> Fold | None:
    for norm in norms:
        for kind in ("norm", "norm_plus_one"):
            fold = Fold(group.consumers, norm, kind)  # type: ignore[arg-type]
            if holds(block, [replace(group, fold=fold)], many) <= TOLERANCE:
                return fold
    return None


def _linear_fold(block: nn.Module, group: InputGroup, order: list[str], one_token: Calls, many: Calls) -> Fold | None:
    """The nearest earlier linear whose rows feed the group's channels one by one."""
    reference = _input_of(block, group.consumers[0], one_token, None)
    if reference is None:
        return None
    for producer in reversed(order[: order.index(group.consumers[0])]):
        if not is_linear(block.get_submodule(producer)):
            continue  # a router: what it gives is a choice
        for subset in _row_subsets(get_weight(block.get_submodule(producer)).shape[0]):
            if len(subset) * _MAX_TIE < group.in_features:
                continue
            rows = _map_rows(block, producer, subset, group, reference, one_token)
            if rows is None:
                continue
            fold = Fold(group.consumers, producer, "linear", rows)
            if holds(block, [replace(group, fold=fold)], many) <= TOLERANCE:
                return fold
    return None


_MAX_TIE = 64  # largest number of channels that one row feeds (query heads per key-value head)


def _row_subsets(rows: int) -> Iterator[Tensor]:
    """Row sets that may feed a group alone: all, halves, thirds, even and odd rows (fused gate and up projections)."""
    index = torch.arange(rows)
    yield index
    for parts in (2, 3):
        if rows % parts == 0:
            yield from reversed(index.view(parts, -1).unbind(0))
    if rows % 2 == 0:
        yield from (index[1::2], index[0::2])


def _map_rows(
    block: nn.Module, producer: str, subset: Tensor, group: InputGroup, reference: Tensor, one_token: Calls
) -> Tensor | None:
    """Row [in] of `producer` that multiplies each channel of the group's input; None when some live channel has none.

    Two probes: the first factor tells the high digit of the row's position in `subset`, the second the low digit.
    """
    rows = get_weight(block.get_submodule(producer)).shape[0]
    base = int(len(subset) ** 0.5) + 1
    live = reference.norm(dim=0) > 0
    if not live.any():
        return None
    position = torch.zeros(group.in_features, dtype=torch.long, device=reference.device)
    for digit in (torch.arange(len(subset)) // base, torch.arange(len(subset)) % base):
        factor = torch.ones(rows)
        factor[subset] = 1.25 + 1.5 * digit.float() / base
        changed = _input_of(block, group.consumers[0], one_token, (producer, factor.to(reference.device)))
        if changed is None or changed.shape != reference.shape:
            return None
        ratio = (changed * reference).sum(0) / reference.pow(2).sum(0).clamp(min=1e-30)
        error = (changed - ratio * reference).norm(dim=0) / changed.norm(dim=0).clamp(min=1e-30)
        level = (ratio - 1.25) / 1.5 * base
        if not ((error < 1e-3) & ((level - level.round()).abs() < 0.1) & (level.round() >= 0) | ~live).all():
            return None
        position = position * base + level.round().long().clamp(0, base - 1)
    if (position[live] >= len(subset)).any():
        return None
    found = subset.to(reference.device)[position.clamp(max=len(subset) - 1)]
    return torch.where(live, found, torch.full_like(found, -1))


def _input_of(block: nn.Module, consumer: str, calls: Calls, scaled: tuple[str, Tensor] | None) -> Tensor | None:
    """The consumer's input [tokens, in] while the producer's output channels are multiplied by a factor [rows]."""
    caught: list[Tensor] = []

    def catch(_module, args):
        caught.append(args[0].detach().reshape(-1, args[0].shape[-1]).clone())
        raise _Reached

    handles = [block.get_submodule(consumer).register_forward_pre_hook(catch)]
    if scaled is not None:
        handles.append(block.get_submodule(scaled[0]).register_forward_hook(lambda _m, _a, out: out * scaled[1]))
    try:
        for call, hidden in calls:
            try:
                call.run(block, hidden)
            except _Reached:
                continue
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(caught) if caught else None
