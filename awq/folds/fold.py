"""`Fold`: a scale that one group of linears can take on its columns because a producer gives it up;
and how to apply it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from awq.nn.surgery import get_weight, is_linear

_UNIT = 2.0**40  # fixed-point logarithms: 12 digits after the point
FoldKind = Literal["norm", "norm_plus_one", "linear"]


@dataclass(frozen=True)
class Fold:
    """consumers: linears whose columns are multiplied by s; producer: the module that is divided by
    it.

    kind: "norm" (w/s, b/s), "norm_plus_one" (weight stored as w − 1: (1+w)/s − 1) or "linear" (rows
    divided).
    rows: int64 [in], for "linear": the producer's row that feeds each input channel; −1 where no
    row was found (s stays 1).
    """

    consumers: tuple[str, ...]
    producer: str
    kind: FoldKind
    rows: Tensor | None = None

    def tie(self, scale: Tensor) -> Tensor:
        """s [in] or [n, in] made equal (geometric mean) over channels that share a row, as under
        grouped-query attention."""
        if self.rows is None:
            return scale

        size = max(1, int(self.rows.max()) + 1)
        rows = self.rows.to(scale.device)
        known = rows >= 0
        rows = rows.clamp(min=0)

        # Fixed point: a GPU adds in any order, and only sums of integers are the same in each.
        logs = torch.where(known, scale.double().log() * _UNIT, 0).round().long()
        total = torch.zeros(
            *scale.shape[:-1], size, dtype=torch.int64, device=scale.device
        ).index_add_(-1, rows, logs)
        count = torch.zeros(size, dtype=torch.int64, device=scale.device).index_add_(
            0, rows, known.long()
        )
        mean = (total.double() / _UNIT / count.clamp(min=1)).exp().to(scale.dtype)

        return torch.where(known, mean[..., rows], torch.ones_like(scale))

    def describe(self) -> str:
        """One line for people: "v_proj rows, each feeding 3 channels"."""
        if self.rows is None:
            return self.producer + (" (1+w)" if self.kind == "norm_plus_one" else "")

        known = self.rows[self.rows >= 0]
        used = len(known.unique())
        tied = f", tied {len(known) // used}" if len(known) > used else ""

        return f"{self.producer} ({used} rows{tied})"


@dataclass(frozen=True)
class InputGroup:
    """Linears that read one tensor, and the fold found for them; `reason` says why there is
    none."""

    consumers: tuple[str, ...]
    in_features: int
    fold: Fold | None = None
    reason: str = ""


@torch.no_grad()
def apply_fold(block: nn.Module, fold: Fold, scale: Tensor) -> None:
    """Multiplies the consumers' columns by s [in] (float32, tied) and divides the producer, in
    place."""
    for name in fold.consumers:
        weight = get_weight(block.get_submodule(name))
        weight.mul_(scale.to(weight))

    producer: Any = block.get_submodule(fold.producer)
    if fold.kind != "linear":
        _divide(producer, scale, plus_one=fold.kind == "norm_plus_one")
        return

    weight = get_weight(producer)
    divisor = row_divisor(block, fold, scale)
    weight.div_(divisor.to(weight).unsqueeze(1))
    if getattr(producer, "bias", None) is not None:
        producer.bias.div_(divisor.to(producer.bias))


def row_divisor(block: nn.Module, fold: Fold, scale: Tensor) -> Tensor:
    """What a "linear" fold divides the producer's rows by, [rows]; 1 for rows that feed none of the
    channels. scale: tied."""
    rows = fold.rows.to(scale.device)  # type: ignore[union-attr]
    divisor = torch.ones(
        get_weight(block.get_submodule(fold.producer)).shape[0],
        dtype=scale.dtype,
        device=scale.device,
    )
    divisor[rows[rows >= 0]] = scale[rows >= 0]

    return divisor


def _divide(norm: Any, scale: Tensor, plus_one: bool) -> None:
    weight = norm.weight
    s = scale.to(weight)
    weight.copy_((1 + weight) / s - 1 if plus_one else weight / s)
    if getattr(norm, "bias", None) is not None:
        norm.bias.div_(s)


def reader_names(block: nn.Module) -> list[str]:
    """Names of all modules below the block that multiply their input by a weight [out, in]:
    linears, and routers.

    A router that holds a bare parameter is no linear and never quantized, but its weight takes part
    in the fold of its input.
    """
    names = []
    for name, module in block.named_modules():
        weight = module._parameters.get("weight")
        matrix = weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)
        if name and (matrix or is_linear(module)):
            names.append(name)
    return names


def linear_names(block: nn.Module) -> list[str]:
    """Names of all linears below the block, in registration order."""
    return [name for name, module in block.named_modules() if name and is_linear(module)]
