"""`WQLinear`: a linear that holds only packed buffers and calls one operator.

Scales stay float16 whatever the model is cast to: they are part of the integer weight, and a cast to bfloat16 would lose
three of their bits for good.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from awq.core.weight import QuantizedWeight
from awq.errors import ConfigError
from awq.formats import get_format
from awq.kernels import quantized_linear


class WQLinear(nn.Module):
    """A 4-bit linear. Buffers `qweight`, `qzeros`, `scales` in the layout of `format`, and `bias` [out] in the model's dtype.

    Raises ConfigError for a shape that the format cannot hold.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        group_size: int = 128,
        format: str = "gemm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.w_bit = in_features, out_features, 4
        self.group_size = in_features if group_size == -1 else group_size
        codec = get_format(format)
        self.format = codec.name
        problem = codec.why_not(in_features, out_features, self.group_size)
        if problem:
            raise ConfigError(f"{codec.name} cannot store a linear of {in_features} inputs and {out_features} outputs: {problem}")
        for name, tensor in codec.empty(in_features, out_features, self.group_size, device).items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", torch.zeros(out_features, device=device, dtype=dtype) if bias else None)

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: Tensor | None = None, format: str = "gemm") -> WQLinear:
        """From a canonical weight [out, in]; raises ConfigError when the format cannot hold its shape."""
        out_features, in_features = weight.codes.shape
        module = cls(in_features, out_features, bias is not None, weight.group_size, format, "meta")
        for name, tensor in get_format(format).pack(weight).items():
            module.register_buffer(name, tensor)
        if bias is not None:
            module.register_buffer("bias", bias.detach().clone())
        return module

    def quantized(self) -> QuantizedWeight:
        """The canonical weight, exactly."""
        tensors = {"qweight": self.qweight, "qzeros": self.qzeros, "scales": self.scales}
        return get_format(self.format).unpack(tensors, self.in_features, self.out_features, self.group_size)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dense weight [out, in]."""
        return self.quantized().dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return quantized_linear(
            x, self.qweight, self.qzeros, self.scales, self.bias,
            self.in_features, self.out_features, self.group_size, self.format,
        )  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WQLinear:
        kept = {name: t for name, t in self._buffers.items() if name != "bias" and t is not None and t.is_floating_point()}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}, format={self.format}"
        )
