"""Reading how the branches of a block are added to its residual stream, and the norms before and
after them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from awq.generate.plan import BlockPlan, Norm, NotFusable
from awq.generate.read.trace import Event, Trace
from awq.nn.norms import is_norm, read_norm


@dataclass(frozen=True)
class Branch:
    """x: what it reads. y: what it gives, before a norm of its own."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Residuals:
    """Norms before and after each branch, whether both branches read the block's input, and the
    branches' factor."""

    parallel: bool
    factor: float
    attention: Norm | None
    attention_post: Norm | None
    mlp: Norm | None
    mlp_post: Norm | None
    norms_sums: bool = False

    def plan(self, **parts: Any) -> BlockPlan:
        """The plan of a block whose branches are added like this. parts: its other fields."""
        return BlockPlan(
            parallel=self.parallel,
            factor=self.factor,
            attention_norm=self.attention,
            attention_post_norm=self.attention_post,
            mlp_norm=self.mlp,
            mlp_post_norm=self.mlp_post,
            norms_sums=self.norms_sums,
            **parts,
        )


def read_residuals(found: Trace, attention: Branch, mlp: Branch | None) -> Residuals:
    """Norms by what they read and write, and whether the branches follow each other. mlp: None
    where a block has one branch only. Raises NotFusable."""
    norms = [
        event
        for event in found.events
        if is_norm(event.module) and event.x.numel() == found.hidden.numel()
    ]
    if mlp is not None and torch.equal(found.hidden, attention.x):
        sums = _norms_of_sums(found, attention, mlp, norms)
        if sums is not None:
            return sums

    before = _that_wrote(attention.x, norms)
    if not torch.equal(found.hidden, attention.x if before is None else before.x):
        raise NotFusable("attention does not read the block's input")

    post = _that_read(attention.y, norms)
    branch = (attention.y if post is None else post.y).view(found.hidden.shape)
    if mlp is None:
        factor = _factor(found.out - found.hidden, branch)
        return Residuals(False, factor, _norm_of(before), _norm_of(post), None, None)

    mlp_post = _that_read(mlp.y, norms)

    second = None
    parallel = True
    stream = found.hidden
    if not torch.equal(mlp.x, attention.x):
        second = _that_wrote(mlp.x, norms)
        # some models flatten the batch here
        stream = (mlp.x if second is None else second.x).view(found.hidden.shape)
        parallel = torch.equal(stream, found.hidden)

    if parallel:
        last = (mlp.y if mlp_post is None else mlp_post.y).view(found.hidden.shape)
        factor = _factor(found.out - found.hidden, branch + last)
    else:
        factor = _factor(stream - found.hidden, branch)

    return Residuals(
        parallel,
        factor,
        _norm_of(before),
        _norm_of(post),
        _norm_of(second),
        _norm_of(mlp_post),
    )


def _norms_of_sums(
    found: Trace,
    attention: Branch,
    mlp: Branch,
    norms: list[Event],
) -> Residuals | None:
    """Both branches are added first and normalized then; None where that is not so."""
    first = _that_wrote(mlp.x, norms)
    last = _that_wrote(found.out, norms)
    if first is None or last is None or first is last:
        return None

    added = first.x - found.hidden
    factor = _factor(added, attention.y.view(added.shape))
    _factor(last.x - mlp.x, mlp.y)

    attention_norm = _norm_of(first)
    mlp_norm = _norm_of(last)

    return Residuals(False, factor, None, attention_norm, None, mlp_norm, norms_sums=True)


def _that_wrote(y: Tensor, norms: list[Event]) -> Event | None:
    return next((event for event in norms if torch.equal(event.y, y)), None)


def _that_read(x: Tensor, norms: list[Event]) -> Event | None:
    return next((event for event in norms if torch.equal(event.x, x)), None)


def _norm_of(event: Event | None) -> Norm | None:
    if event is None:
        return None
    norm = read_norm(event.module, event.x, event.y)
    if norm is None:
        raise NotFusable(f"{event.name} is no norm that is known here")
    return norm


def _factor(sum_: Tensor, branch: Tensor) -> float:
    """f in sum = f · branch; 1 exactly when it is 1 up to rounding."""
    f = float(
        (sum_.double() * branch.double()).sum() / branch.double().square().sum().clamp(min=1e-30)
    )
    if not torch.allclose(sum_, f * branch, rtol=1e-3, atol=1e-4 * float(branch.abs().max())):
        raise NotFusable("the branches are not simply added to the residual stream")
    return 1.0 if abs(f - 1) < 1e-4 else f
