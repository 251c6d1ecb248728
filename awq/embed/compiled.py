"""An encoder as one native program for the CPU at hand: built from what `structure` reads, proven,
then used.

`compile_encoder` of `proof` gives a `CompiledEncoder`. The proof runs texts of several lengths,
one token among them, through transformers' forward and through the program; what differs by more
than rounding is refused. `kernels.cpu.encoder.program` says what the program does.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from awq.embed.build import build_image
from awq.embed.structure import EncoderPlan
from awq.native.runner import Rows, Runner

logger = logging.getLogger("awq.embed")


@dataclass(frozen=True)
class CompiledState:
    """Whether texts run through the native program, and if not, why."""

    active: bool
    reason: str | None = None

    def __bool__(self) -> bool:
        return self.active


class CompiledEncoder:
    """Embeddings [texts, hidden] of token ids, packed one text after the other."""

    def __init__(
        self,
        plan: EncoderPlan,
        pooling: str,
        normalize: bool,
        precision: str = "exact",
    ) -> None:
        self.plan = plan
        self.runner = Runner(build_image(plan, pooling, normalize, precision))
        self.spec = self.runner.spec
        self.why_not = self.runner.why_not
        self._has_warned = False

    def takes(self, rows: Rows) -> bool:
        """Whether these rows can be computed. The first time that they cannot, the log says why."""
        reason = self.why_not(rows)
        if reason is not None and not self._has_warned:
            self._has_warned = True
            logger.warning("Such texts are not run compiled, but by torch: %s.", reason)
        return reason is None

    def __call__(
        self,
        rows: Rows,
        types: Rows | None = None,
        prompt_tokens: int = 0,
        helpers: int | None = None,
    ) -> Tensor:
        """float32 [texts, hidden] of rows of token ids. types: their token types. prompt_tokens:
        leading ones not pooled.

        helpers: at most so many threads beside the caller's own, and no more than torch has.
        """
        most = self.helpers if helpers is None else min(helpers, self.helpers)
        return torch.from_numpy(self.runner(rows, types, prompt_tokens, most))

    def embeddings(self, rows: Rows, types: Rows | None = None, prompt_tokens: int = 0) -> Tensor:
        """The same of any number of texts, a few hundred tokens at a time."""
        found = self.runner.embeddings(rows, types, prompt_tokens, self.helpers)
        return torch.from_numpy(found)

    def hidden_states(self, rows: Rows, types: Rows | None = None) -> Tensor:
        """float32 [tokens of all rows together, hidden]: what pooling is given."""
        return torch.from_numpy(self.runner.hidden_states(rows, types))

    @property
    def helpers(self) -> int:
        """Threads that may help a caller: as many as there are cores, and torch may use."""
        return min(self.runner.helpers, torch.get_num_threads() - 1)
