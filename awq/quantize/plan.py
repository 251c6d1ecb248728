"""Which linears are quantized, decided and checked before any work starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from awq.config import AwqConfig
from awq.errors import ConfigError, ModelError
from awq.formats import get_format
from awq.nn.surgery import LINEARS, is_linear, linear_shape

MAX_ODD_SHARE = 0.05  # of the blocks' weights that may lie in linears which the group size does not divide


@dataclass
class Plan:
    """targets: full names of linears to quantize; skipped: full name → reason for the linears that stay as they are."""

    targets: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)

    def skip(self, names: set[str], reason: str) -> None:
        """Leaves these as they are. Raises ModelError when nothing is left to quantize."""
        self.targets -= names
        self.skipped |= dict.fromkeys(sorted(names), reason)
        if not self.targets:
            raise ModelError(f"no linear is left to quantize; skipped: {self.skipped or 'none found'}.")


def excluded_by(name: str, patterns: tuple[str, ...]) -> str | None:
    """The first pattern that names this module or a module around it, in whole name parts ("mlp.gate", "layers.1")."""
    return next((p for p in patterns if f".{p}." in f".{name}."), None)


def make_plan(model: nn.Module, lists: list[tuple[str, nn.ModuleList]], config: AwqConfig, packed: bool = True) -> Plan:
    """Decides for every linear of the model.

    Linears whose input the group size does not divide stay as they are where they hold next to none of the weights (gemma3n's
    products of 4 channels). Raises ConfigError when they hold more, naming the first, or when packed weights are asked for in
    other than 4 bits; ModelError when nothing is left to quantize.
    """
    if packed and config.bits != 4:
        raise ConfigError(
            f"bits is {config.bits}: packed formats hold 4 bits; use w_bit 4, or export_compatible=True for dense weights."
        )
    plan, problems, sizes = Plan(), {}, {}
    prefixes = tuple(f"{prefix}." for prefix, _ in lists)
    for name, module in model.named_modules():
        if not is_linear(module):
            if isinstance(module, LINEARS):  # named in the checkpoint, for readers who take every such module for a linear
                plan.skipped[name] = f"{type(module).__name__} does more than a linear"
            continue
        in_features, out_features = linear_shape(module)
        pattern = excluded_by(name, config.modules_to_not_convert)
        if not name.startswith(prefixes):
            plan.skipped[name] = "outside the repeated blocks"
        elif pattern is not None:
            plan.skipped[name] = f"excluded by modules_to_not_convert: {pattern}"
        else:
            sizes[name] = in_features * out_features
            try:
                size = config.group_size_of(in_features, name)
            except ConfigError as error:
                problems[name] = str(error)
                continue
            reason = get_format(config.format).why_not(in_features, out_features, size) if packed else None
            if reason:
                plan.skipped[name] = reason
            else:
                plan.targets.add(name)
    if sum(sizes[name] for name in problems) > MAX_ODD_SHARE * sum(sizes.values()):
        more = f" ({len(problems) - 1} more linears have the same problem)" if len(problems) > 1 else ""
        raise ConfigError(next(iter(problems.values())) + more)
    plan.skip(set(problems), "the group size does not divide its in_features")
    return plan
