"""AutoAWQ's import path `awq.quantize.quantizer.AwqQuantizer`: its constructor in front of
`quantize_model`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from awq._lazy import lazy_names
from awq.config import AwqConfig
from awq.core.weight import round_to_nearest
from awq.nn.surgery import get_weight

# AutoAWQ's module had them, too
__getattr__ = lazy_names(
    __name__, {"clear_memory": "awq.utils.utils", "get_best_device": "awq.utils.utils"}
)


class AwqQuantizer:
    """The quantizer of AutoAWQ's signature. `quantize_model` does the work; as `quantizer_cls` the
    name is accepted, and classes made of it are refused."""

    def __init__(
        self,
        awq_model: Any,
        model: Any = None,
        tokenizer: Any = None,
        w_bit: int = 4,
        group_size: int = 128,
        zero_point: bool = True,
        version: str = "gemm",
        calib_data: Any = "pileval",
        split: str = "train",
        text_column: str = "text",
        duo_scaling: bool = True,
        modules_to_not_convert: list[str] | None = None,
        **options: Any,
    ) -> None:
        self.awq_model = awq_model
        self.model = model
        self.tokenizer = tokenizer
        self.w_bit = w_bit
        self.group_size = group_size
        self.zero_point = zero_point
        self.version = version
        self.config = AwqConfig(
            w_bit, group_size, zero_point, version, tuple(modules_to_not_convert or ())
        )
        options |= {"split": split, "text_column": text_column, "duo_scaling": duo_scaling}
        self._call = {"calib_data": calib_data, **options}

    def quantize(self) -> Any:
        """Quantizes the wrapped model in place; returns its `QuantReport`."""
        return self.awq_model.quantize(self.tokenizer, quant_config=self.config, **self._call)

    def pack(self) -> None:
        self.awq_model.pack()

    def pseudo_quantize_tensor(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Nearest representable values of a weight [out, in] in its dtype, with scales and zeros
        [out, groups]."""
        found = round_to_nearest(w, self.group_size, self.w_bit, self.zero_point)
        zeros = found.zeros.to(w.dtype) if self.zero_point else None
        return found.dequantize(w.dtype), found.scales.to(w.dtype), zeros

    @staticmethod
    def pseudo_dequantize_tensor(
        w: nn.Linear,
        scales: Tensor,
        zeros: Tensor | None = None,
    ) -> Tensor:
        """Weight values of a linear whose weight holds codes [out, in], with scales and zeros [out,
        groups]."""
        codes = get_weight(w)
        size = codes.shape[1] // scales.shape[1]
        offset = torch.zeros_like(scales) if zeros is None else zeros
        offsets = offset.repeat_interleave(size, 1)
        return (codes - offsets) * scales.repeat_interleave(size, 1)
