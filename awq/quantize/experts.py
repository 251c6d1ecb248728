"""Mixtures of experts in the pipeline: groups by expert, and statistics for experts that few tokens
reach.

All experts of a layer read the same hidden states, so one fold feeds them all, and their scale is
searched for the layer. But each expert sees its own tokens only, and its codes are chosen for
these: an `InputStatistics` of its own, in which a token counts with the router's weight, since that
is how its error reaches the output.

An expert that few tokens reach would be rounded for next to nothing. It borrows from the layer: as
many tokens as it lacks to TOKENS_PER_CHANNEL for each input, and at most all that there are. Gate
and up borrow the layer's own Gram matrix, which is there already; down needs its expert to run on
the borrowed tokens. Why this rule: docs/experts.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from awq.folds import InputGroup
from awq.nn.experts import ExpertLinears, expert_of, named_experts
from awq.nn.hooks import hooked
from awq.nn.sorted_products import SortedProducts
from awq.nn.surgery import device_of
from awq.quantize.plan import Plan
from awq.quantize.statistics import InputStatistics, MaskHolder, kept_rows

WEIGHT_POWER = 1.0  # of the router's weight, with which a token counts in its expert's statistics
# Serving engines multiply this projection of multi-head latent attention out when they load it: 4
# bits there only cost quality.
DEQUANTIZED_BY_ENGINES = "kv_b_proj"


class RoutedStatistics(InputStatistics):
    """Statistics of what one expert's linear reads: its routed tokens, weighted by the router.

    `calls` stays 0: these inputs come in another order and number than the layer's tokens.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self._weight = torch.zeros((), dtype=torch.float32, device=device)

    def add_routed(self, x: Tensor, mask: Tensor | None, weights: Tensor) -> None:
        """x: [n, in]; mask: bool [n] of real tokens; weights: float [n], the router's."""
        (rows,), counts = kept_rows([x.detach().float()], mask)
        self._counts += counts
        weights = weights.detach().float().abs().pow(WEIGHT_POWER)
        kept = rows.any(-1)
        weights = torch.where(kept, weights, 0.0).unsqueeze(-1)
        weighted = rows * weights
        self.gram.addmm_(weighted.t(), rows)
        self.sum += weighted.sum(0)
        self.abs_sum += weighted.abs().sum(0)
        self._weight += weights.sum()

    def normalize(self) -> None:
        """Scales the sums so that the weights of all tokens add up to their number."""
        factor = self.tokens / self._weight.clamp(min=1e-30)
        for total in (self.gram, self.sum, self.abs_sum):
            total *= factor

    @property
    def wanted(self) -> int:
        """How many tokens to borrow, if there are as many."""
        return self.missing_tokens

    def borrow(self, layer: InputStatistics) -> int:
        """Adds what the layer's tokens would, as many as are wanted and there are; returns how
        many."""
        amount = min(self.wanted, layer.tokens)
        if amount > 0:
            share = amount / layer.tokens
            self.gram.add_(layer.gram, alpha=share)
            self.sum.add_(layer.sum, alpha=share)
            self.abs_sum.add_(layer.abs_sum, alpha=share)
            self._counts[0] += amount
        return amount


@dataclass(frozen=True)
class RoundingPart:
    """Linears that are rounded together: those of a group that see the same tokens.

    source: index of the group whose scale they take; statistics: the name their input's statistics
    are filed under.
    """

    group: InputGroup
    source: int
    statistics: str
    names: list[str]


def statistics_name(block: nn.Module, group: InputGroup) -> str:
    """Under which name the input of a whole group is found: its first linear, or the module of
    experts that hands it out."""
    for name in group.consumers:
        if expert_of(block, name) is None:
            return name

    owner, _ = expert_of(block, group.consumers[0]) or ("", 0)
    alone = len({expert_of(block, name) for name in group.consumers}) == 1

    return group.consumers[0] if alone else owner


def rounding_parts(
    block: nn.Module,
    groups: Sequence[InputGroup],
    chosen: Collection[str],
) -> list[RoundingPart]:
    """The groups, split into what is in no expert and what is in each. chosen: names of the block's
    linears to quantize."""
    parts = []
    for source, group in enumerate(groups):
        by_expert: dict[tuple[str, int] | None, list[str]] = {}
        for name in group.consumers:
            by_expert.setdefault(expert_of(block, name), []).append(name)
        for consumers in by_expert.values():
            names = [name for name in consumers if name in chosen]
            if names:
                parts.append(
                    RoundingPart(
                        replace(group, consumers=tuple(consumers)), source, consumers[0], names
                    )
                )
    return parts


@dataclass
class ExpertTokens:
    """Tokens that each expert of a layer got, and those its `down` borrowed."""

    routed: list[int]
    borrowed: list[int]


@contextmanager
def collect_experts(
    block: nn.Module,
    names: Collection[str],
    holder: MaskHolder,
    statistics: dict[str, InputStatistics],
    hidden: dict[str, list[Tensor]],
) -> Iterator[None]:
    """While open, every forward of `block` adds the inputs of linears in experts to `statistics`,
    by the linear's name.

    What a layer's experts read together is added under the name of the module of experts.
    hidden: name of the experts → a list that gets their inputs [tokens, hidden], batch by batch,
    without padding.
    """
    now: dict[str, tuple[Tensor, Tensor]] = {}
    owners = named_experts(block)

    def watch_for(owner: str):
        def watch(_number: int, tokens: Tensor, weights: Tensor) -> None:
            now[owner] = tokens, weights

        return watch

    owner_of = {name: _owner_of(block, name) for name in names}

    def add_routed(name: str, args: tuple) -> None:
        x = args[0]
        tokens, weights = now[owner_of[name]]
        mask = holder.mask
        if mask is not None:
            mask = mask.reshape(-1)[tokens]
        if name not in statistics:
            statistics[name] = RoutedStatistics(x.shape[-1], x.device)

        found: Any = statistics[name]
        found.add_routed(x, mask, weights * holder.weight)

    def add_shared(owner: str, args: tuple) -> None:
        x, mask = owners[owner].layer_inputs(args[0], holder.mask)
        own = statistics.setdefault(owner, InputStatistics(x.shape[-1], x.device))
        own.add(x, mask, holder.weight)
        hidden[owner].append(x if mask is None else x[mask.reshape(-1)])

    for owner, experts in owners.items():
        experts.watch = watch_for(owner)
    try:
        with hooked(block, owners, before=add_shared), hooked(block, names, before=add_routed):
            yield
    finally:
        for experts in owners.values():
            experts.watch = None


def _owner_of(block: nn.Module, name: str) -> str:
    """The module of experts that holds the linear `name`."""
    place = expert_of(block, name)
    assert place is not None
    return place[0]


def complete_experts(
    block: nn.Module,
    statistics: dict[str, InputStatistics],
    names: Collection[str],
    hidden: dict[str, list[Tensor]],
) -> dict[str, ExpertTokens]:
    """Normalizes the experts' statistics and lets those with few tokens borrow; returns each layer
    of experts' tokens.

    statistics: of the experts' linears `names`, and of the layer's input under the name of the
    experts. hidden: name of the experts → their inputs [tokens, hidden] (padding left out), batch
    by batch.
    """
    report = {}
    for owner, experts in named_experts(block).items():
        device = device_of(experts)
        # never called: of no tokens
        layer = statistics.setdefault(owner, InputStatistics(experts.shape.hidden, device))
        tokens = ExpertTokens([0] * experts.shape.num_experts, [0] * experts.shape.num_experts)
        for name in names:
            place = expert_of(block, name)
            if place is None or place[0] != owner:
                continue

            number = place[1]
            linear: Any = block.get_submodule(name)
            found: Any = statistics.setdefault(
                name, RoutedStatistics(linear.weight.shape[1], layer.gram.device)
            )
            tokens.routed[number] = found.tokens
            found.normalize()

            if name.endswith(f".{experts.names.down}"):
                tokens.borrowed[number] = _borrow_inner(experts, number, found, hidden[owner])
            else:
                found.borrow(layer)

        report[owner] = tokens
    return report


def _borrow_inner(
    experts: ExpertLinears,
    number: int,
    found: RoutedStatistics,
    hidden: list[Tensor],
) -> int:
    """For the second product: its expert runs on as many of the layer's tokens as are lacking."""
    if found.wanted <= 0:
        return 0

    seen = InputStatistics(len(found.gram), found.gram.device)
    gate, up, _ = experts.linears(number)

    # Evenly spread over the batches, so that no text is left out.
    step = max(1, sum(len(x) for x in hidden) // found.wanted)
    for x in hidden:
        rows = x[::step]
        first = up(rows) if gate is None else experts.shape.join(gate(rows), up(rows), -1)
        seen.add(experts.activate(first), None)

    seen.complete()

    return found.borrow(seen)


def skip_in_mixtures(plan: Plan, model: nn.Module) -> None:
    """Takes out of the plan what must stay dense in models with experts: routers, and what engines
    dequantize at load.

    Experts of a layer are packed all or none, as every engine wants them.
    """
    plan_routers = router_names(model) & plan.targets
    if plan_routers:
        plan.skip(
            plan_routers, "a router: a changed choice of experts costs more than its few weights"
        )

    latent = {name for name in plan.targets if name.rpartition(".")[2] == DEQUANTIZED_BY_ENGINES}
    if latent:
        plan.skip(latent, "serving engines dequantize it when they load it")
    for owner in named_experts(model):
        members = {
            name for name in plan.targets | set(plan.skipped) if name.startswith(f"{owner}.")
        }
        if members & set(plan.skipped):
            plan.skip(members & plan.targets, "another linear of its experts cannot be packed")


def router_names(model: nn.Module) -> set[str]:
    """Linears that choose experts: beside a list or module of experts, with one output for each."""
    routers: set[str] = set()
    for name, module in model.named_modules():
        count = _number_of_experts(module)
        if count is None:
            continue

        parent = name.rpartition(".")[0]
        for inner, linear in model.get_submodule(parent).named_modules():
            full = f"{parent}.{inner}" if parent else inner
            if full.startswith(f"{name}."):
                continue
            if isinstance(linear, nn.Linear) and linear.out_features == count:
                routers.add(full)
    return routers


def _number_of_experts(module: nn.Module) -> int | None:
    if isinstance(module, SortedProducts):
        return module.num_experts
    if isinstance(module, ExpertLinears):
        return module.shape.num_experts + module.shape.identities
    if not isinstance(module, nn.ModuleList) or len(module) < 2:
        return None

    alike = len({type(member) for member in module}) == 1
    linears = [m for m in module[0].modules() if isinstance(m, nn.Linear)]
    if alike and len(linears) >= 2:
        return len(module)
    return None
