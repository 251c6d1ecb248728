"""`FusedBody`: what a language model computes, as embedding, fused blocks, norm and head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from awq.generate.plan import DecoderPlan
from awq.generate.run import operations as ops
from awq.generate.run.block import FusedBlock, Prompt, Step
from awq.generate.run.cache import LayerCache
from awq.generate.run.projection import separate
from awq.nn.blocks import is_product

_PROMPT_TOKENS = 4096  # of all rows together, in one piece of a prompt


class FusedBody:
    """Reads the weights of a transformers model, whose siblings it joins; keeps no tokens.

    merge: of `FusedBlock`. head: the output layer, which may be replaced by a quantized one.
    """

    def __init__(self, plan: DecoderPlan, merge: bool = True) -> None:
        self.plan = plan
        self.head = plan.head
        self.blocks: list[FusedBlock] = []

        try:
            factor = 1.0
            for block_plan, block in zip(plan.blocks, plan.modules):
                self.blocks.append(FusedBlock(block_plan, block, merge, factor))
                factor = block_plan.factor
        except BaseException:
            self.separate()
            raise

    def separate(self) -> None:
        """Puts separate siblings back into the transformers model; the body is of no use
        afterwards."""
        for block in self.plan.modules:
            separate(block)
        self.blocks = []

    def linears(self) -> Iterator[nn.Module]:
        """What stands in the transformers model where the plan reads linears."""
        for plan, block in zip(self.plan.blocks, self.plan.modules):
            for name in plan.names:
                yield block.get_submodule(name)
            if plan.own is not None:
                yield from filter(is_product, block.get_submodule(plan.own.name).modules())

    def last_of(
        self,
        ids: Tensor,
        lengths: Sequence[int],
        cache: list[LayerCache],
        padding: Tensor,
    ) -> Tensor:
        """The normalized output [batch, features] of the last token of each prompt."""
        batch, tokens = ids.shape
        last = torch.tensor(lengths, device=ids.device) - 1
        found: Tensor | None = None

        # recurrent mixers of transformers begin anew with every call of more than one token
        piece = max(1, _PROMPT_TOKENS // batch) if self.plan.states is None else tokens

        for start in range(0, tokens, piece):
            part = ids[:, start : start + piece]
            positions = torch.arange(start, start + part.shape[1], device=ids.device)
            positions = positions + padding.unsqueeze(1)
            hidden = self.hidden(part, positions, cache, Prompt(start))
            inside = (last - start).clamp(0, part.shape[1] - 1)
            chosen = hidden[torch.arange(batch, device=ids.device), inside]

            if found is None:
                found = chosen
            else:
                found = torch.where((last >= start).unsqueeze(1), chosen, found)

        assert found is not None

        return found

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: list[LayerCache],
        where: Prompt | Step,
    ) -> Tensor:
        """ids [batch, tokens] → the normalized output of the last block [batch, tokens,
        features]."""
        p = self.plan
        x = p.embedding(ids)
        if p.embedding_factor != 1.0:
            x = x * torch.tensor(p.embedding_factor, dtype=x.dtype)
        if p.positions is not None:
            x = (x.float() + p.positions[positions.long()]).to(x.dtype)
        if p.embedding_norm is not None:
            x = ops.normalize(x, p.embedding_norm)

        branch = None

        for block, layer in zip(self.blocks, cache):
            x, branch = block(x, branch, layer, where)

        return ops.add_norm(x, branch, p.blocks[-1].factor, p.norm)[1]

    def logits(self, x: Tensor) -> Tensor:
        logits = ops.head(x, self.head)
        if self.plan.logits_factor != 1.0:
            logits = logits * self.plan.logits_factor
        cap = self.plan.logits_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)
