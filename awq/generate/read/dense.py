"""Reading an MLP of two or three linears and an activation off its trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from awq.generate.plan import MlpPlan, NotFusable, Source
from awq.generate.read.channels import find_channels, flat
from awq.generate.read.trace import Event
from awq.kernels.reference.decode import ACTIVATIONS
from awq.nn.blocks import is_product
from awq.nn.norms import is_norm


@dataclass(frozen=True)
class MlpFound:
    """x, y: what the branch reads, and what its last linear (or module) gives."""

    plan: MlpPlan
    x: Tensor
    y: Tensor


def read_dense(events: Sequence[Event]) -> MlpFound:
    """events: of the MLP's modules, in their order. Raises NotFusable."""
    linears = [event for event in events if is_product(event.module)]
    if len(linears) < 2:
        raise NotFusable(f"the MLP has {len(linears)} linears, not two or three")

    *first, last = linears
    if any(not torch.equal(event.x, first[0].x) for event in first):
        raise NotFusable(
            "the MLP's first linears do not share one input (a mixture of experts, perhaps)"
        )

    outputs = torch.cat([flat(event.y) for event in first], 1)
    for event in events:
        rows = _rows_of_activation(event, outputs)
        if rows is None:
            continue

        gated = len(rows) > event.x.shape[-1]
        product = event.y
        if gated:
            product = event.y * outputs[:, rows[event.x.shape[-1] :]].view(event.y.shape)
        if product.shape == last.x.shape and _equal_up_to_rounding(product, last.x):
            source = Source(tuple(e.name for e in first), rows)
            name = _activation_name(event.module, event.x)
            plan = MlpPlan(source, last.name, gated, event.module, name)
            return MlpFound(plan, first[0].x, last.y)

    raise NotFusable("the MLP is not act(gate)·up or act(up) followed by a linear")


def _rows_of_activation(event: Event, outputs: Tensor) -> Tensor | None:
    """Rows of the first linears' outputs [n, total], those that the activation reads first, then
    the rest; None for others."""
    if is_product(event.module) or is_norm(event.module) or event.y.shape != event.x.shape:
        return None

    total = outputs.shape[1]
    place = find_channels(flat(event.x), [outputs])
    if place is None or len(place) not in (total, total // 2):
        return None

    rest = torch.ones(total, dtype=torch.bool, device=place.device)
    rest[place] = False
    return torch.cat([place, rest.nonzero().flatten()])


def _equal_up_to_rounding(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def _activation_name(module: nn.Module, x: Tensor) -> str | None:
    """The activation's name in `ACTIVATIONS` if it is one of them over the whole range of
    numbers."""
    ramp = torch.linspace(-12, 12, 4001, device=x.device, dtype=torch.float32)
    y = module(ramp)
    for name, function in ACTIVATIONS.items():
        if torch.allclose(function(ramp), y, rtol=1e-5, atol=1e-6):
            return name

    return None
