"""What tuning trains: scales and codes of quantized linears, and a model's dense vectors.

A code is trained through the place where its weight would be, were it not rounded (straight-through
estimator, arXiv 1308.3432). Places begin where coordinate descent would put each weight, given all
others, so that a code near the middle between two values changes for a small reason, and another
one for none. Scales change by a share of themselves; vectors (weights of norms, biases) stay dense
in the files, so training them costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from awq.core.weight import QuantizedWeight, storable_scale

_LEANS = 256  # of them are a step
_MOST_LEAN = 125  # less than half a step: a code that nothing moves stays


def packed_lean(lean: Tensor) -> Tensor:
    """How far codes would move were they not rounded, in steps, as int8: 1/256 of a step each, and
    less than half a step."""
    return (lean * _LEANS).nan_to_num(0.0).round_().clamp_(-_MOST_LEAN, _MOST_LEAN).to(torch.int8)


class TunedLinear(nn.Module):
    """A quantized linear in training: weight = round(place) · s · (1 + change).

    lean: int8 [out, in] as `packed_lean` gives it; None: the codes stay. dtype: of the products.
    After a backward, `pass_on` gives the weight's gradient to what is trained; after a step of the
    optimizer, `write` makes the weight anew.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        lean: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.quantized = weight
        self.steps = weight.steps().to(device)
        self.start = weight.scales.float().to(device)
        zeros = weight.zeros.to(device, torch.float32).unsqueeze(-1)
        self.low = -zeros
        self.high = 2**weight.bits - 1 - zeros
        self.change = nn.Parameter(torch.zeros_like(self.start))
        self.place: nn.Parameter | None = None
        if lean is not None:
            self.place = nn.Parameter(self.steps.float() + lean.to(device).float() / _LEANS)

        # shares its memory with the linear's own
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.weight = nn.Parameter(torch.empty(self.steps.shape, dtype=dtype, device=device))
        self.write()

    @property
    def scale(self) -> Tensor:
        """float32 [out, groups]"""
        return self.start * (1 + self.change)

    def near(self) -> Tensor:
        """Codes − zeros, float32 [out, groups, group]."""
        shape = (*self.start.shape, -1)
        if self.place is None:
            return self.steps.float().view(shape)
        return torch.minimum(
            torch.maximum(self.place.detach().round().view(shape), self.low), self.high
        )

    @torch.no_grad()
    def write(self) -> None:
        dense = self.near().mul_(self.scale.unsqueeze(-1))
        self.weight.copy_(dense.view_as(self.weight))

    @torch.no_grad()
    def pass_on(self) -> None:
        """The gradient of the weight becomes that of change and place."""
        if self.weight.grad is None:
            return

        by_group = self.weight.grad.float().view(*self.start.shape, -1)
        self.weight.grad = None
        self.change.grad = (by_group * self.near()).sum(-1).mul_(self.start)
        if self.place is not None:
            self.place.grad = (by_group * self.scale.unsqueeze(-1)).view_as(self.place)

    def trained(self) -> list[nn.Parameter]:
        return [self.change] if self.place is None else [self.change, self.place]

    def result(self) -> QuantizedWeight:
        """The weight as it is now, on the device of the one that was given."""
        given = self.quantized
        scales = storable_scale(self.scale.detach()).half().to(given.scales.device)
        if self.place is None:
            return given._replace(scales=scales)

        codes = (self.near() - self.low).view(given.codes.shape)
        return given._replace(scales=scales, codes=codes.to(given.codes.dtype).to(scales.device))

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.linear(x, self.weight.to(x.dtype))
        return out if self.bias is None else out + self.bias


class Vectors:
    """Dense vectors of a model in training, by float32 copies: in 16 bits small steps would get
    lost."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        # each once, however many modules share it; one of zeros has no size to change by a share of
        self.given = [p for p in dict.fromkeys(parameters) if bool(p.any())]
        self.copies = [nn.Parameter(p.detach().float().clone()) for p in self.given]
        self.before = [p.detach().clone() for p in self.given]

    @torch.no_grad()
    def sizes(self) -> list[float]:
        """Root mean square of each."""
        return [float(copy.pow(2).mean().sqrt()) for copy in self.copies]

    def pass_on(self) -> None:
        for given, copy in zip(self.given, self.copies):
            if given.grad is not None:
                copy.grad, given.grad = given.grad.float(), None

    @torch.no_grad()
    def write(self) -> None:
        for given, copy in zip(self.given, self.copies):
            given.copy_(copy)

    @torch.no_grad()
    def restore(self) -> None:
        """As they were before training, to the bit."""
        for given, old in zip(self.given, self.before):
            given.copy_(old)
