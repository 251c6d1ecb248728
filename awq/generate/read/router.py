"""Reading how a mixture chooses its experts off one run of it, without names.

What the experts are handed says it all: which of them, and with which weights. Any parameter of
[experts, features] may be the router's, and any vector of [experts] its bias or a correction of the
choice. Each is tried with every kind of scores; the one that gives the same choice and the same
weights for random tokens is it.

A correction that is small beside the scores, as after little training, may move no choice of a few
tokens, and a limit to groups may turn none away. So there are many tokens, and a second run in
which all vectors of [experts] hold other values: what has no part in the choice then changes none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from awq.generate.plan import Mixture, MlpPlan, NotFusable, RouterSource
from awq.generate.read.channels import same_numbers
from awq.generate.read.dense import read_dense
from awq.generate.read.trace import Event
from awq.kernels.reference.decode import ACTIVATIONS
from awq.kernels.reference.mixture import route
from awq.nn.block_calls import hidden_of
from awq.nn.blocks import is_product
from awq.nn.hooks import Call, listening
from awq.nn.packed_experts import AwqExperts

_TOLERANCE = 1e-5  # of the largest weight, in float32
_TRIAL_CHANNELS = 4.0  # standard deviation of what gates are tried on
_TRIAL_TOKENS = 256  # that routers are tried on, in each of two runs
_TRIAL_VECTOR = 0.3  # standard deviation of corrections and biases in the second run


@torch.no_grad()
def read_mixture(module: nn.Module, name: str, x: Tensor) -> Mixture | None:
    """The plan of a mixture that is a router, experts, and perhaps an MLP for every token; None for
    any other, or one whose parts are not known.

    module: a float32 copy, called `name` in its block. x: float32 [..., features], its input.
    """
    parts = [(n, m) for n, m in module.named_modules() if isinstance(m, AwqExperts)]
    if len(parts) != 1:
        return None

    place, experts = parts[0]
    activation = _activation_of(experts)
    if activation is None:
        return None

    calls: list[Call] = []
    beside = _modules_beside(module, place)

    with listening([experts, *beside], after=calls.append):
        y = hidden_of(module(x))

    of_experts = [call for call in calls if call.module is experts]
    if len(of_experts) != 1 or len(of_experts[0].args) != 3:
        return None

    rows, index, weights = of_experts[0].args
    rows = rows.reshape(-1, rows.shape[-1])
    output = of_experts[0].output.reshape(rows.shape)
    if not same_numbers(rows, x):
        return None

    shared = gate = None
    if not same_numbers(output, y):
        others = [call for call in calls if call.module is not experts]
        found = _shared_of(others, beside, name, x, y.reshape(rows.shape) - output)
        if found is None:
            return None  # something else is added

        shared, gate = found

    own = _tensors_beside(module, place)
    seen = [_Routing(own, rows, index, weights), *_trials(module, experts, own, x)]
    source = _router_of(seen, experts.shape.num_experts)
    if source is None:
        return None

    weight, bias, correction = (
        None if tensor is None else f"{name}.{tensor}"
        for tensor in (source.weight, source.bias, source.correction)
    )
    assert weight is not None
    router = replace(source, weight=weight, bias=bias, correction=correction)

    return Mixture(f"{name}.{place}", router, activation, shared, gate)


def _modules_beside(module: nn.Module, experts: str) -> dict[nn.Module, str]:
    """Modules of a mixture by name, without its experts and those that hold them."""
    return {
        part: name
        for name, part in module.named_modules()
        if name and not f"{experts}.".startswith(f"{name}.") and not name.startswith(f"{experts}.")
    }


def _shared_of(
    calls: Sequence[Call], names: Mapping[nn.Module, str], prefix: str, x: Tensor, added: Tensor
) -> tuple[MlpPlan, str | None] | None:
    """The MLP that gives what is `added` [tokens, features] to the experts' output, and the linear
    of one output that gates it, if there is one; None for anything else."""
    size = float(added.abs().max())
    readers = [
        call
        for call in calls
        if call.args
        and isinstance(call.args[0], Tensor)
        and isinstance(call.output, Tensor)
        and same_numbers(call.args[0], x)
    ]
    gates = [call for call in readers if call.output.numel() == len(added)]

    for call in readers:
        if call.output.numel() != added.numel() or is_product(call.module):
            continue

        whole = call.output.reshape(added.shape)

        for gate in (None, *gates):
            found = whole
            if gate is not None:
                found = whole * gate.output.reshape(-1, 1).sigmoid()
            if not torch.allclose(found, added, rtol=0, atol=_TOLERANCE * size):
                continue

            plan = _plan_of(calls, names, call, prefix)
            if plan is None or (gate is not None and not _is_plain(gate.module)):
                return None

            return plan, None if gate is None else f"{prefix}.{names[gate.module]}"

    return None


def _plan_of(
    calls: Sequence[Call], names: Mapping[nn.Module, str], mlp: Call, prefix: str
) -> MlpPlan | None:
    """The plan of the MLP that was called so, or None where it is none that is known."""
    events = [
        Event(f"{prefix}.{names[call.module]}", call.module, call.args[0], call.output)
        for call in calls
        if names[call.module].startswith(f"{names[mlp.module]}.")
        and (is_product(call.module) or not any(True for _ in call.module.children()))
    ]
    try:
        found = read_dense(events)
    except NotFusable:
        return None
    whole = same_numbers(found.x, mlp.args[0]) and same_numbers(found.y, mlp.output)
    return found.plan if whole else None


def _is_plain(module: nn.Module) -> bool:
    """Whether a gate is a weight of one row, in full precision and without a bias."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and bias is None


def _activation_of(experts: AwqExperts) -> str | None:
    """The name of the activation in act(gate) · up, where that is all between the products."""
    shape = experts.shape
    if not shape.has_gate or shape.sorted_rows or shape.identities or experts.has_norm:
        return None

    generator = torch.Generator().manual_seed(3)
    joined = _TRIAL_CHANNELS * torch.randn(
        16, 2 * shape.inner, generator=generator, dtype=torch.float32
    )
    joined = joined.to(experts.first.qweight.device)
    found = experts.activate(joined)
    gate, up = shape.split(joined, -1)

    for name, function in ACTIVATIONS.items():
        if torch.allclose(function(gate) * up, found, rtol=1e-5, atol=1e-5):
            return name

    return None


def _tensors_beside(module: nn.Module, experts: str) -> dict[str, Tensor]:
    """Parameters and buffers of a mixture by name, without those of its experts."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in own.items() if not name.startswith(f"{experts}.")}


class _Routing(NamedTuple):
    """What a mixture handed to its experts in one run.

    tensors: those beside the experts, by name. x: [tokens, features]; chosen: experts, and
    weights: theirs, both [tokens, top_k].
    """

    tensors: Mapping[str, Tensor]
    x: Tensor
    chosen: Tensor
    weights: Tensor


class _Handed(Exception):
    """Ends a forward when the experts have been called."""


def _trials(
    module: nn.Module, experts: AwqExperts, own: Mapping[str, Tensor], x: Tensor
) -> Iterator[_Routing]:
    """What many random tokens like `x` [..., features] are routed to, with the module's own vectors
    of [experts] and with random ones. own: the tensors beside the experts, which do not run."""
    count = experts.shape.num_experts
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(x.device)

    others = {
        name: _TRIAL_VECTOR * random(count)
        for name, tensor in own.items()
        if tensor.shape == (count,) and tensor.is_floating_point()
    }
    sizes = x.flatten(0, -2).square().mean(0).sqrt()
    leading = (1,) * (x.dim() - 2)
    for vectors in ({}, others) if others else ({},):
        tokens = random(*leading, _TRIAL_TOKENS, len(sizes)) * sizes
        yield _handed(module, experts, vectors, tokens, own)


def _handed(
    module: nn.Module,
    experts: AwqExperts,
    vectors: Mapping[str, Tensor],
    x: Tensor,
    own: Mapping[str, Tensor],
) -> _Routing:
    """One run, as far as the experts, in which `vectors` take the places of the module's own."""
    calls: list[Call] = []

    def end(call: Call) -> None:
        calls.append(call)
        raise _Handed

    with listening([experts], before=end), suppress(_Handed):
        functional_call(module, dict(vectors), (x,))

    rows, index, weights = calls[0].args
    return _Routing({**own, **vectors}, rows.reshape(-1, rows.shape[-1]), index, weights)


def _router_of(seen: Sequence[_Routing], count: int) -> RouterSource | None:
    """What routes tokens among `count` experts as was seen in every run."""
    tensors = seen[0].tensors
    features = seen[0].x.shape[-1]
    chosen = torch.cat([run.chosen for run in seen])
    expected = torch.cat([_spread(run.chosen, run.weights, count) for run in seen])
    groups = _groups_of(chosen, count)
    vectors = [name for name, tensor in tensors.items() if tensor.shape == (count,)]
    matrices = [name for name, tensor in tensors.items() if tensor.shape == (count, features)]

    for name in matrices:
        for source in _sources(name, vectors, chosen.shape[1], groups):
            factor = _factor(source, seen, expected)
            if factor is not None:
                return replace(source, factor=factor)

    return None


def _factor(source: RouterSource, seen: Sequence[_Routing], expected: Tensor) -> float | None:
    """By what the weights of `source` are multiplied to be those that were seen, or None where they
    are others. expected: by expert, [tokens of all runs, experts]."""
    count = expected.shape[1]
    routed = [route(run.x, source.of(run.tensors)) for run in seen]
    found = torch.cat([_spread(*choice, count) for choice in routed])

    size = found.square().sum().clamp(min=1e-30)
    factor = float((found * expected).sum() / size)
    if abs(factor - 1) < _TOLERANCE:
        factor = 1.0

    error = (factor * found - expected).abs().max()
    return factor if error <= _TOLERANCE * expected.abs().max() else None


def _groups_of(index: Tensor, count: int) -> list[tuple[int, int]]:
    """(groups, how many of them any token's experts lie in) where that is fewer than the experts of
    a token could, for experts `index` [tokens, top_k] of `count`."""
    found = []
    for groups in range(2, count // 2 + 1):
        if count % groups:
            continue
        hit = torch.zeros(len(index), groups, device=index.device)
        hit.scatter_(1, index.long() // (count // groups), 1.0)
        kept = int(hit.sum(1).max())
        if kept < min(groups, index.shape[1]):
            found.append((groups, kept))

    return found


def _sources(
    weight: str, vectors: list[str], top_k: int, groups: Sequence[tuple[int, int]]
) -> Iterator[RouterSource]:
    """Every way to route by one weight, the plainest first."""
    plain = RouterSource(weight, top_k, False, True, 1.0, None, None)
    biased = [replace(plain, bias=name) for name in vectors]
    corrected = [replace(plain, correction=name) for name in vectors]
    ways = [plain, *biased, *corrected]
    limited = [
        replace(way, groups=count, kept=kept, group_best=best)
        for count, kept in groups
        for best in (1, 2)
        for way in ways
    ]
    for source in [*ways, *limited]:
        for sigmoid in (False, True):
            scored = replace(source, sigmoid=sigmoid)
            yield scored
            yield replace(scored, normalized=False)


def _spread(index: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Weights by expert, [tokens, experts]."""
    spread = torch.zeros(len(index), experts, dtype=torch.float32, device=index.device)
    return spread.scatter_add(1, index.long(), weights.float())
