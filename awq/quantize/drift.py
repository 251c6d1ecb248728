"""What quantized predecessors change in a linear's input, and the weight that makes up for part of it.

Error feedback minimises ‖(Ŵ − W) X̂‖ on the inputs X̂ that the linear gets now. The output that it should give is W X, with the
inputs X of the original model (GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695). The part of the difference that is linear in X̂
moves into the target of rounding: W + α W D Ĝ⁻¹, with D = (X − X̂) X̂ᵀ and Ĝ = X̂ X̂ᵀ. α = 1 follows the calibration tokens fully, and
less of it carries over to other text (measured: docs/notes/quality.md).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from awq.nn.blocks import BlockCall
from awq.nn.surgery import linear_shape
from awq.quantize.statistics import InputStatistics

_KEPT = 1 << 29  # values of inputs that are kept rather than computed again: 2 GiB


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
        """Of x − x̂, with none for tokens that are lacking."""
        return self.drift_sum / max(1, self.tokens + self.lacking)

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


class OriginalInputs:
    """What linears of the original block read, batch by batch, while the block beside it is quantized.

    One forward notes the inputs of all of them where these fit into memory; else each comes from a forward that stops there.
    """

    def __init__(
        self, block: nn.Module, names: Sequence[str], calls: list[BlockCall], hidden: list[Tensor], unseen: Collection[int]
    ) -> None:
        """hidden: float32 [batch, tokens, features] before the block; unseen: batches that nobody asks for."""
        self.block, self.names, self.calls, self.hidden = block, names, calls, hidden
        tokens = sum(h.shape[0] * h.shape[1] for h in hidden)
        width = sum(linear_shape(block.get_submodule(name))[0] for name in names)
        self.kept: list[dict[str, Tensor]] | None = None
        if tokens * width <= _KEPT:
            found = [_inputs_and_output(block, () if i in unseen else names, *pair) for i, pair in enumerate(zip(calls, hidden))]
            if all(whole for _, _, whole in found):
                self.kept, self._outputs = [inputs for inputs, _, _ in found], [output for _, output, _ in found]

    def of(self, name: str, batch: int) -> Tensor:
        """[batch, tokens, in]."""
        if self.kept is not None:
            return self.kept[batch][name]
        return input_of(self.block, name, self.calls[batch], self.hidden[batch])

    def outputs(self) -> list[Tensor]:
        """The block's new hidden states, for every batch."""
        if self.kept is not None:
            return self._outputs
        return [call.run(self.block, hidden) for call, hidden in zip(self.calls, self.hidden)]


def _inputs_and_output(
    block: nn.Module, names: Sequence[str], call: BlockCall, hidden: Tensor
) -> tuple[dict[str, Tensor], Tensor, bool]:
    """(inputs of the named linears, output of the block, whether the inputs are still what they were when they were read)."""
    inputs: dict[str, Tensor] = {}
    versions: dict[str, int] = {}

    def hook_for(name: str):
        def hook(_module: nn.Module, args: tuple) -> None:
            inputs[name], versions[name] = args[0], args[0]._version

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in names]
    try:
        output = call.run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, output, all(inputs[name]._version == version for name, version in versions.items())


def corrected(weight: Tensor, drift: Tensor, order: Tensor, factor: Tensor, share: float) -> Tensor:
    """weight + share · weight · drift · Ĝ⁻¹, with Ĝ⁻¹ as `feedback_factor` gives it: columns in `order`, UᵀU."""
    change = (weight @ drift[:, order]) @ factor.t() @ factor
    return weight.index_add(1, order, change, alpha=share)
