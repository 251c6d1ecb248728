"""Reading the second branch of a block off its trace: an MLP, or a module that is left as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from awq.generate.plan import MlpPlan, Source
from awq.generate.read.dense import MlpFound, read_dense
from awq.generate.read.router import read_mixture
from awq.generate.read.trace import Event, Trace, holds_packed_experts


def read_mlp(found: Trace, events: Sequence[Event]) -> MlpFound:
    """events: those of the trace that attention does not own. Raises NotFusable."""
    mixture = next((event for event in found.after if holds_packed_experts(event.module)), None)
    if mixture is None:
        return read_dense(events)

    left = left_as_it_is(mixture.name, mixture.x, mixture.y)
    routed = read_mixture(mixture.module, mixture.name, mixture.x)
    return replace(left, plan=replace(left.plan, routed=routed))


def left_as_it_is(name: str, x: Tensor, y: Tensor, reason: str = "") -> MlpFound:
    """The branch that one module computes in the model's own code."""
    whole = Source((name,), torch.arange(x.shape[-1]))
    return MlpFound(MlpPlan(whole, name, False, nn.Identity(), None, name, reason), x, y)
