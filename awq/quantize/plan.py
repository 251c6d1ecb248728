"""Which linears are quantized, decided and checked before any work starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel

from awq.checkpoint.match import nameless
from awq.config import AwqConfig, fitting_group_sizes
from awq.errors import ConfigError, ModelError
from awq.formats import get_format
from awq.nn.blocks import BlockList
from awq.nn.surgery import LINEARS, is_linear, linear_shape

# of the blocks' weights in tensors that are no linear's: less are norms, tables and gates
MIN_BARE_SHARE = 0.01
# of the blocks' weights in linears that the group size does not divide: more is a mistaken group
# size, where another one fits
MAX_ODD_SHARE = 0.1
_NOT_BARE = (*LINEARS, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)


@dataclass
class Plan:
    """targets: full names of linears to quantize; skipped: full name → reason for the linears that
    stay as they are."""

    targets: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def skip(self, names: set[str], reason: str) -> None:
        """Leaves these as they are. Raises ModelError when nothing is left to quantize."""
        self.targets -= names
        self.skipped |= dict.fromkeys(sorted(names), reason)
        if not self.targets:
            raise ModelError(
                f"no linear is left to quantize; skipped: {self.skipped or 'none found'}."
            )


def excluded_by(name: str, patterns: tuple[str, ...]) -> str | None:
    """The first pattern that names this module or a module around it, in whole name parts
    ("mlp.gate", "layers.1")."""
    return next((p for p in patterns if f".{p}." in f".{name}."), None)


def make_plan(
    model: nn.Module,
    lists: Sequence[BlockList],
    config: AwqConfig,
    packed: bool = True,
    unreached: Sequence[str] = (),
    towers: Sequence[str] = (),
) -> Plan:
    """Decides for every linear of the model.

    lists: the repeated blocks to quantize; unreached: names of lists of blocks that the calibration
    inputs do not reach; towers: of those that they reach and nobody asked for. Linears whose input
    the group size does not divide stay dense and are named. Raises ConfigError when they hold more
    than a tenth of the weights and another group size fits them, naming the first and that size;
    ModelError when nothing is left to quantize.
    """
    plan = Plan()
    odd: dict[str, str] = {}
    weights: dict[str, int] = {}
    widths: dict[str, int] = {}
    for name, module in model.named_modules():
        if not is_linear(module):
            # named in the checkpoint, for readers who take every such module for a linear
            if isinstance(module, LINEARS):
                plan.skipped[name] = f"{type(module).__name__} does more than a linear"
            continue

        reason = _why_dense(name, lists, config, unreached, towers)
        if reason:
            plan.skipped[name] = reason
            continue

        in_features, out_features = linear_shape(module)
        weights[name] = in_features * out_features
        widths[name] = in_features

        try:
            size = config.group_size_of(in_features, name)
        except ConfigError as error:
            odd[name] = str(error)
            continue

        if packed:
            reason = get_format(config.format).why_not(in_features, out_features, size)
        else:
            reason = None

        if reason:
            plan.skipped[name] = reason
        else:
            plan.targets.add(name)

    _skip_odd(plan, odd, weights, widths)
    if packed and isinstance(model, PreTrainedModel):
        lost = nameless(model, plan.targets)
        plan.skip(lost, "the source's files hold its weight as a bare tensor, not as a module's")

    _name_bare(plan, model, lists)
    return plan


def _why_dense(
    name: str,
    lists: Sequence[BlockList],
    config: AwqConfig,
    unreached: Sequence[str],
    towers: Sequence[str],
) -> str | None:
    """Why a linear stays dense whatever its shape."""
    for tower in unreached:
        if name.startswith(f"{tower}."):
            return f"the calibration inputs do not reach {tower}"

    for tower in towers:
        if name.startswith(f"{tower}."):
            return f"a tower that was not asked for (towers): {tower}"

    if not any(name.startswith(f"{blocks}.") for blocks, _ in lists):
        return "outside the repeated blocks"

    pattern = excluded_by(name, config.modules_to_not_convert)
    return None if pattern is None else f"excluded by modules_to_not_convert: {pattern}"


def _skip_odd(
    plan: Plan,
    odd: dict[str, str],
    weights: dict[str, int],
    widths: dict[str, int],
) -> None:
    """Takes out linears that the group size does not divide.

    odd: name → error. weights, widths: number of weights and of inputs of every linear. Where no
    group size fits them, no setting would help: the rest of the model is quantized.
    """
    share = sum(weights[name] for name in odd) / max(1, sum(weights.values()))
    if share > MAX_ODD_SHARE and fitting_group_sizes(widths[name] for name in odd):
        more = f" ({len(odd) - 1} more linears have the same problem)" if len(odd) > 1 else ""
        raise ConfigError(next(iter(odd.values())) + more)

    plan.skip(set(odd), "the group size does not divide its in_features")
    if odd:
        plan.warnings.append(
            f"{len(odd)} linears with {share:.1%} of the blocks' weights stay dense, for the "
            f"group size does not divide their inputs; the first: {next(iter(odd.values()))}"
        )


def _name_bare(plan: Plan, model: nn.Module, lists: Sequence[BlockList]) -> None:
    """Names the modules of the blocks that multiply by tensors of their own: no linear is there to
    quantize.

    Experts in a form that is not known here are such modules, and often hold most of a model.
    """
    blocks = [module for _, members in lists for module in members]
    total = sum({id(p): p.numel() for block in blocks for p in block.parameters()}.values())
    sizes: dict[str, dict[str, int]] = {}  # class → name of a module → its numbers
    for name, module, count in _bare_weights(model, lists):
        sizes.setdefault(type(module).__name__, {})[name] = count
    for kind, members in sizes.items():
        share = sum(members.values()) / max(1, total)
        if share < MIN_BARE_SHARE:
            continue

        plan.skipped |= dict.fromkeys(
            sorted(members), f"{kind} holds its weights in tensors of its own, not in linears"
        )
        plan.warnings.append(
            f"{share:.1%} of the blocks' weights stay dense: {kind} holds them in tensors of its "
            "own, not in linears "
            f"({len(members)} modules, the first is {next(iter(members))})."
        )


def _bare_weights(
    model: nn.Module, lists: Sequence[BlockList]
) -> Iterator[tuple[str, nn.Module, int]]:
    """(name, module, how many numbers) of the blocks' modules that hold matrices and are no
    linears, tables or convolutions."""
    for name, module in model.named_modules():
        if not name.startswith(tuple(f"{prefix}." for prefix, _ in lists)) or isinstance(
            module, _NOT_BARE
        ):
            continue

        matrices = [p for p in module.parameters(recurse=False) if _is_matrix(p)]
        if matrices:
            yield name, module, sum(p.numel() for p in matrices)


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.dim() >= 2 and min(parameter.shape[-2:]) > 1
