"""`awq.modules.act.ScaledActivation`: an activation whose output is divided per channel."""

from torch import Tensor, nn


class ScaledActivation(nn.Module):
    """act(x) / scales; scales [features]."""

    def __init__(self, module: nn.Module, scales: Tensor) -> None:
        super().__init__()
        self.act = module
        self.scales = nn.Parameter(scales.data)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) / self.scales.view(1, 1, -1).to(x.device)
