"""What quantized predecessors change in a linear's input, and the weight that makes up for part of it.

Error feedback minimises ‖(Ŵ − W) X̂‖ on the inputs X̂ that the linear gets now. The output that it should give is W X, with the
inputs X of the original model (GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695). The part of the difference that is linear in X̂
moves into the target of rounding: W + α W D Ĝ⁻¹, with D = (X − X̂) X̂ᵀ and Ĝ = X̂ X̂ᵀ. α = 1 follows the calibration tokens fully, and
less of it carries over to other text (measured: docs/notes/quality.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from awq.nn.blocks import BlockCall
from awq.quantize.statistics import InputStatistics


class DriftStatistics(InputStatistics):
    """Sums over tokens of x̂, a linear's input now, and of x, its input in the original model.

    drift: float32 [in, in] = Σ (x − x̂) x̂ᵀ; drift_sum: float32 [in] = Σ (x − x̂). gram and sum are of x̂; |x̂| is not summed.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.drift = torch.zeros(in_features, in_features, device=device)
        self.drift_sum = torch.zeros(in_features, device=device)

    def add_pair(self, now: Tensor, original: Tensor, mask: Tensor | None) -> None:
        """Both [batch, tokens, in]; mask: bool [batch, tokens] of real tokens. A token that is not finite in either is dropped."""
        rows = self._kept(torch.cat([now, original], -1).float().flatten(0, -2), mask)
        now, original = rows.chunk(2, -1)
        moved = original - now
        self.gram.addmm_(now.t(), now)
        self.sum += now.sum(0)
        self.drift.addmm_(moved.t(), now)
        self.drift_sum += moved.sum(0)

    @property
    def drift_mean(self) -> Tensor:
        """Of x − x̂; imagined tokens have none."""
        return self.drift_sum / max(1, self.tokens + self.imagined)

    @property
    def centred_drift(self) -> Tensor:
        """Σ (x − x̂ − its mean)(x̂ − mean)ᵀ."""
        return torch.addr(self.drift, self.drift_sum, self.mean, alpha=-1)


class _Reached(Exception):
    """Ends a forward where its rest is of no use."""


def input_of(block: nn.Module, name: str, call: BlockCall, hidden: Tensor) -> Tensor:
    """The input [batch, tokens, in] of the linear `name` in a forward of its block, which stops there."""
    found: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple) -> None:
        found.append(args[0])
        raise _Reached

    handle = block.get_submodule(name).register_forward_pre_hook(hook)
    try:
        call.run(block, hidden)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def corrected(weight: Tensor, drift: Tensor, order: Tensor, factor: Tensor, share: float) -> Tensor:
    """weight + share · weight · drift · Ĝ⁻¹, with Ĝ⁻¹ as `feedback_factor` gives it: columns in `order`, UᵀU."""
    change = (weight @ drift[:, order]) @ factor.t() @ factor
    return weight.index_add(1, order, change, alpha=share)
