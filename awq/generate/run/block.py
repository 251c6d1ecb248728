"""One fused decoder block: norm, qkv, attention with cache, output, norm, MLP, from a plan."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from awq.generate.plan import BlockPlan, Mixture, MlpPlan, Source
from awq.generate.run import operations as ops
from awq.generate.run.cache import LayerCache
from awq.generate.run.own import OwnModule
from awq.generate.run.projection import Projection, join, joinable
from awq.generate.run.where import Prompt as Prompt
from awq.generate.run.where import Step as Step
from awq.kernels.reference.decode import heads_flat
from awq.nn.block_calls import hidden_of


class FusedBlock(nn.Module):
    """Runs a `BlockPlan` with the linears of a transformers block. factor: of the branch that the
    block before it leaves to be added."""

    def __init__(
        self,
        plan: BlockPlan,
        block: nn.Module,
        merge: bool = False,
        factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.factor = factor
        if plan.own is not None:
            self.own = OwnModule(plan.own, block)
        if plan.qkv is not None and plan.attention_out is not None:
            self.qkv = _product(block, plan.qkv, merge)
            self.attention_out = block.get_submodule(plan.attention_out)

        self.mlp = None if plan.mlp is None else FusedMlp(plan.mlp, block, merge)
        routed = None if plan.mlp is None else plan.mlp.routed
        self.mixture = None if routed is None else FusedMixture(routed, block, merge)

    def forward(
        self, x: Tensor, branch: Tensor | None, cache: LayerCache, where: Prompt | Step
    ) -> tuple[Tensor, Tensor | None]:
        """x [batch, tokens, features] is the residual stream, to which `branch` is still to be
        added; returns both anew.

        The last addition is left to the next block, which can do it together with its norm. So may
        be the sum over a token's experts: then the branch is [batch, tokens, parts, features].
        """
        p = self.plan
        x, normed = ops.add_norm(x, branch, self.factor, p.attention_norm)
        a = self._mixed(normed, cache, where)
        if p.whole:
            return a, None
        if p.norms_sums and self.mlp is not None:
            _, x = ops.add_norm(x, a, p.factor, p.attention_post_norm)
            _, x = ops.add_norm(x, self.mlp(x), p.factor, p.mlp_post_norm)
            return x, None

        if p.attention_post_norm is not None:
            a = ops.normalize(a, p.attention_post_norm)
        if self.mlp is None:
            return x, a
        if p.parallel:
            m = normed if p.mlp_norm is None else ops.normalize(x, p.mlp_norm)
            return x, a + self._mlp(m)
        if self.mixture is not None:
            x, normed, *choice = ops.add_norm_route(x, a, p.factor, p.mlp_norm, self.mixture.router)
            parts = self.mixture(normed, *choice)
            post = p.mlp_post_norm
            return x, parts if post is None else ops.normalize(ops.summed(parts), post)

        x, normed = ops.add_norm(x, a, p.factor, p.mlp_norm)
        return x, self._mlp(normed)

    def _mixed(self, x: Tensor, cache: LayerCache, where: Prompt | Step) -> Tensor:
        """The first branch, before a norm of its own."""
        if self.plan.own is not None:
            return self.own(x, cache, where)
        return self.attention_out(self._attention(self.qkv(x), cache, where))

    def _mlp(self, x: Tensor) -> Tensor:
        assert self.mlp is not None
        y = self.mlp(x)
        norm = self.plan.mlp_post_norm
        return y if norm is None else ops.normalize(y, norm)

    def _attention(self, qkv: Tensor, cache: LayerCache, where: Prompt | Step) -> Tensor:
        plan = self.plan
        a = plan.attention
        assert a is not None
        if isinstance(where, Step):
            lengths, longest = where.lengths, where.longest
            return ops.attend_step(qkv, a, plan.cos, plan.sin, cache, lengths, longest)

        start = where.start
        tokens = qkv.shape[1]
        queries = ops.cache_prompt(qkv, a, plan.cos, plan.sin, cache, start)
        seen = cache.until(start + tokens)
        heads = ops.attend_cached(queries, seen, a)

        return heads_flat(heads)


class FusedMixture(nn.Module):
    """Runs the experts of a `Mixture` of a transformers block, among which `router` chooses, and
    the MLP that all tokens share."""

    def __init__(self, plan: Mixture, block: nn.Module, merge: bool = False) -> None:
        super().__init__()
        own: dict[str, Tensor] = dict(block.named_parameters())
        own |= block.named_buffers()
        self.router = plan.router.of(own)
        self.experts = block.get_submodule(plan.experts)
        self.activation = plan.activation
        self.shared: FusedMlp | None = None
        if plan.shared is not None:
            self.shared = FusedMlp(plan.shared, block, merge)

        self.shared_gate: nn.Module | None = None
        if plan.shared_gate is not None:
            self.shared_gate = block.get_submodule(plan.shared_gate)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """[batch, tokens, parts, features] for x [batch, tokens, features]."""
        parts = ops.expert_parts(x, self.experts, index, weights, self.activation)  # type: ignore[arg-type]
        if self.shared is None:
            return parts

        y = self.shared(x)
        if self.shared_gate is not None:
            y = y * self.shared_gate(x).sigmoid()
        return torch.cat([parts, y.unsqueeze(-2)], -2)


class FusedMlp(nn.Module):
    """Runs an `MlpPlan` with the linears, or the module, of a transformers block."""

    def __init__(self, plan: MlpPlan, block: nn.Module, merge: bool) -> None:
        super().__init__()
        self.plan = plan
        self.last = block.get_submodule(plan.last)
        if plan.module is not None:
            return

        first = plan.first
        self.interleave = 0
        if merge:
            self.interleave, first = self._interleaved(block)
        self.first = _product(block, first, merge)

    def forward(self, x: Tensor) -> Tensor:
        """The second branch for x [batch, tokens, features], before a norm of its own."""
        p = self.plan
        if p.module is not None:
            return hidden_of(self.last(x)).reshape(x.shape)

        if self.interleave and p.activation_name is not None:
            h = ops.gated(x, self.first, p.activation_name, self.interleave)  # type: ignore[arg-type]
        else:
            h = ops.activate(self.first(x), p.activation, p.activation_name, p.gated)

        return self.last(h)

    def _interleaved(self, block: nn.Module) -> tuple[int, Source]:
        """(n, n channels of the gate and n of up in turn) where product and activation are one
        kernel; else (0, as they are)."""
        plan = self.plan
        first = plan.first
        linears = [block.get_submodule(name) for name in first.names]
        if not plan.gated or plan.activation_name is None:
            return 0, first
        if not joinable(linears, first):
            return 0, first

        count = ops.gate_interleave(linears[0])  # type: ignore[arg-type]
        if not count or len(first.rows) % (2 * count):
            return 0, first

        in_turn = first.rows.view(2, -1, count).transpose(0, 1)
        return count, Source(first.names, in_turn.flatten())


def _product(block: nn.Module, source: Source, merge: bool) -> nn.Module:
    joined = join(block, source) if merge else None
    return Projection(block, source) if joined is None else joined
