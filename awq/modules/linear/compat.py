"""AutoAWQ's constructor and `from_linear` on top of `WQLinear`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from awq.core.weight import quantize_nearest
from awq.errors import ConfigError
from awq.formats import get_format
from awq.nn.linear import WQLinear
from awq.nn.surgery import get_weight, linear_shape


class CompatLinear(WQLinear):
    """`WQLinear` with AutoAWQ's argument order."""

    version: ClassVar[str] = "gemm"

    def __init__(
        self, w_bit: int, group_size: int, in_features: int, out_features: int, bias: bool, dev: Any, training: bool = False
    ) -> None:
        if w_bit != 4:
            raise ConfigError(f"w_bit is {w_bit}; packed linears hold 4 bits.")
        super().__init__(in_features, out_features, bool(bias), group_size, self.version, dev, torch.float16)
        self.training = training

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        w_bit: int,
        group_size: int,
        init_only: bool = False,
        scales: Tensor | None = None,
        zeros: Tensor | None = None,
    ) -> CompatLinear:
        """Packs a dense linear with given scales and zeros [out, groups], as AutoAWQ does; init_only leaves it empty."""
        in_features, out_features = linear_shape(linear)
        bias = getattr(linear, "bias", None)
        module = cls(w_bit, group_size, in_features, out_features, bias is not None, linear.weight.device)
        if init_only:
            return module
        if scales is None or zeros is None:
            raise ConfigError("from_linear needs scales and zeros [out, groups], or init_only=True.")
        weight = quantize_nearest(get_weight(linear), scales.float(), zeros.float(), w_bit)
        for name, tensor in get_format(cls.version).pack(weight).items():
            module.register_buffer(name, tensor)
        if bias is not None:
            module.register_buffer("bias", bias.detach().clone())
        return module
