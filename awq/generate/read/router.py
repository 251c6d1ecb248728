"""Reading how a mixture chooses its experts off one run of it, without names.

What the experts are handed says it all: which of them, and with which weights. Any parameter of
[experts, features] may be the router's, and any vector of [experts] its bias or a correction of the
choice. Each is tried with every kind of scores; the one that gives the same choice and the same
weights for random tokens is it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from awq.generate.plan import Mixture, RouterSource
from awq.generate.read.channels import same_numbers
from awq.kernels.reference.decode import ACTIVATIONS
from awq.kernels.reference.mixture import route
from awq.nn.block_calls import hidden_of
from awq.nn.hooks import Call, listening
from awq.nn.packed_experts import AwqExperts

_TOLERANCE = 1e-5  # of the largest weight, in float32
_TRIAL_CHANNELS = 4.0  # standard deviation of what gates are tried on


@torch.no_grad()
def read_mixture(module: nn.Module, name: str, x: Tensor) -> Mixture | None:
    """The plan of a mixture that is a router and experts and nothing else; None for any other, or
    one whose parts are not known.

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
    with listening([experts], after=calls.append):
        y = hidden_of(module(x))
    if len(calls) != 1 or len(calls[0].args) != 3:
        return None

    rows, index, weights = calls[0].args
    rows = rows.reshape(-1, rows.shape[-1])
    if not same_numbers(rows, x) or not same_numbers(calls[0].output, y):
        return None  # something else is added, as by shared experts

    others = _tensors_beside(module, place)
    source = _router_of(others, experts.shape.num_experts, rows, index, weights)
    if source is None:
        return None

    weight, bias, correction = (
        None if tensor is None else f"{name}.{tensor}"
        for tensor in (source.weight, source.bias, source.correction)
    )
    assert weight is not None
    router = replace(source, weight=weight, bias=bias, correction=correction)

    return Mixture(f"{name}.{place}", router, activation)


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


def _router_of(
    tensors: dict[str, Tensor], count: int, x: Tensor, index: Tensor, weights: Tensor
) -> RouterSource | None:
    """What routes tokens x [tokens, features] among `count` experts to `index` with `weights`, both
    [tokens, top_k]."""
    top = index.shape[1]
    expected = _spread(index, weights.float(), count)
    vectors = [name for name, t in tensors.items() if t.shape == (count,)]
    for name, weight in tensors.items():
        if weight.shape != (count, x.shape[-1]):
            continue
        for source in _sources(name, vectors, top):
            found = _spread(*route(x, source.of(tensors)), count)
            factor = float((found * expected).sum() / found.square().sum().clamp(min=1e-30))
            factor = 1.0 if abs(factor - 1) < _TOLERANCE else factor
            error = (factor * found - expected).abs().max()
            if error <= _TOLERANCE * expected.abs().max():
                return replace(source, factor=factor)

    return None


def _sources(weight: str, vectors: list[str], top_k: int) -> Iterator[RouterSource]:
    """Every way to route by one weight, the plainest first."""
    plain = RouterSource(weight, top_k, False, True, 1.0, None, None)
    biased = [replace(plain, bias=name) for name in vectors]
    corrected = [replace(plain, correction=name) for name in vectors]
    for source in [plain, *biased, *corrected]:
        for sigmoid in (False, True):
            scored = replace(source, sigmoid=sigmoid)
            yield scored
            yield replace(scored, normalized=False)


def _spread(index: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Weights by expert, [tokens, experts]."""
    spread = torch.zeros(len(index), experts, dtype=torch.float32, device=index.device)
    return spread.scatter_add(1, index.long(), weights.float())
