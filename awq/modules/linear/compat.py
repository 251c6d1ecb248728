"""AutoAWQ's constructor and `from_linear` on top of `WQLinear`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from awq.core.weight import QuantizedWeight, quantize_nearest, round_to_nearest
from awq.errors import ConfigError
from awq.formats import get_format
from awq.nn.linear import WQLinear
from awq.nn.surgery import get_weight, linear_shape


class _ByFormat(type):
    """Makes `isinstance(module, WQLinear_GEMM)` true for every `WQLinear` of that format: PEFT and
    others ask this way."""

    def __instancecheck__(cls, instance: Any) -> bool:
        version = cls.__dict__.get("version")
        return type.__instancecheck__(cls, instance) or (
            version is not None and isinstance(instance, WQLinear) and instance.format == version
        )


class CompatLinear(WQLinear, metaclass=_ByFormat):
    """`WQLinear` with AutoAWQ's argument order."""

    version: ClassVar[str]
    scales_first_axis: ClassVar[str] = "out"

    def __init__(
        self,
        w_bit: int,
        group_size: int,
        in_features: int,
        out_features: int,
        bias: bool,
        dev: Any,
        training: bool = False,
    ) -> None:
        if w_bit != 4:
            raise ConfigError(f"w_bit is {w_bit}; packed linears hold 4 bits.")

        super().__init__(
            in_features, out_features, bool(bias), group_size, self.version, dev, torch.float16
        )
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
        """Packs a dense linear; init_only leaves the packed one empty.

        scales, zeros: as AutoAWQ's quantizer hands them over, [groups, out] for gemm and [out,
        groups] for the others (either is understood when its shape is unmistakable). None finds
        them by rounding to nearest.
        """
        in_features, out_features = linear_shape(linear)
        bias = getattr(linear, "bias", None)
        if init_only:
            return cls(
                w_bit, group_size, in_features, out_features, bias is not None, linear.weight.device
            )
        if scales is None:
            return cls.from_quantized(round_to_nearest(get_weight(linear), group_size, w_bit), bias)

        scale = cls._by_rows(scales, out_features).float()
        if zeros is None:
            zero = torch.full_like(scale, 8)
        else:
            zero = cls._by_rows(zeros, out_features).float()

        return cls.from_quantized(quantize_nearest(get_weight(linear), scale, zero, w_bit), bias)

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        format: str | None = None,
        layout: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> CompatLinear:
        """From a canonical weight [out, in]; the format is the class's own. layout: in memory,
        instead of the format's."""
        if format is not None and get_format(format).name != cls.version:
            raise ConfigError(f"{cls.__name__} holds version {cls.version}, not {format}.")

        out_features, in_features = weight.codes.shape
        module = cls(
            weight.bits, weight.group_size, in_features, out_features, bias is not None, "meta"
        )
        module.dtype = dtype or module.dtype

        return module._hold(weight, bias, layout)

    @classmethod
    def _by_rows(cls, table: Tensor, out_features: int) -> Tensor:
        """A table of scales or zeros as [out, groups]."""
        rows, columns = table.shape
        if cls.scales_first_axis == "groups":
            by_groups = columns == out_features
        else:
            by_groups = rows != out_features
        return table.t() if by_groups else table
