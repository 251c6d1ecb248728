"""An activation whose output is divided per channel: AutoAWQ's fold where a GELU stands between two
linears."""

from __future__ import annotations

from torch import Tensor, nn


class ScaledActivation(nn.Module):
    """act(x) / scales, for x [..., features] and scales [features].

    The scales lie in a checkpoint as `<activation>.scales`.
    """

    def __init__(self, module: nn.Module, scales: Tensor) -> None:
        super().__init__()
        self.act = module
        self.scales = nn.Parameter(scales.data)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) / self.scales.to(x.device, x.dtype)
