"""`WQLinear`: a linear that holds only packed buffers and calls one operator.

Scales stay float16 whatever the model is cast to: they are part of the integer weight, and a cast
to bfloat16 would lose three of their bits for good.

The buffers hold either the checkpoint's layout (`format`) or the one that the backend of their
device computes on (`layout`); never both. `settle` moves them, at load (`awq.nn.layout.prepare`) or
at the first forward on a new device; `state_dict` and `load_state_dict` always speak the
checkpoint's layout, byte for byte.

Threads may call one linear at once, the first time too: a forward reads its tensors and their
layout from one immutable `Packed`, so that a layout that changes meanwhile is seen as a whole or
not at all. Changes take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from awq.config import PACKED_TENSORS
from awq.core.weight import QuantizedWeight
from awq.errors import ConfigError, ModelError
from awq.formats import get_format, get_layout
from awq.kernels import Packed, Shape, layout_for, quantized_linear
from awq.nn.weight_access import metadata_view

if TYPE_CHECKING:
    from typing_extensions import Self

_changing = RLock()  # held while the layout of any linear changes: rare, and short


def layouts_stay() -> AbstractContextManager[Any]:
    """Inside, no other thread moves a linear to another layout: a graph that is recorded reads the
    tensors that are there, and none that is given back meanwhile."""
    return _changing


def _no_weight() -> None:
    raise ModelError(
        "the model computes with the weight of a packed linear, which has none; dequantize() "
        "gives it."
    )


class WQLinear(nn.Module):
    """A 4-bit linear. Buffers `qweight`, `qzeros`, `scales` in `layout`, and `bias` [out] in the
    model's dtype.

    dtype: the model's, as far as is known; what is asked of `weight` is answered with it.
    format: the layout in checkpoints. layout: the one in memory now: `format`, or what the device's
    backend computes on.

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
        self.in_features = in_features
        self.out_features = out_features
        self.w_bit = 4
        self.group_size = in_features if group_size == -1 else group_size
        codec = get_format(format)
        self.format = self.layout = codec.name
        self.dtype = dtype or torch.float16
        self._settled: Packed | None = None  # None until a layout was chosen for the device

        # tensors of the checkpoint that packing again would not give back bit for bit
        self._kept: dict[str, Tensor] = {}
        problem = codec.why_not(in_features, out_features, self.group_size)
        if problem:
            raise ConfigError(
                f"{codec.name} cannot store a linear of {in_features} inputs and {out_features} "
                f"outputs: {problem}"
            )

        for name, tensor in codec.empty(in_features, out_features, self.group_size, device).items():
            self.register_buffer(name, tensor)
        self.register_buffer(
            "bias", torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        )

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        format: str = "gemm",
        layout: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> WQLinear:
        """From a canonical weight [out, in]. layout: in memory, instead of the format's. dtype: of
        the model.

        Raises ConfigError when the format cannot hold its shape.
        """
        out_features, in_features = weight.codes.shape
        return cls(
            in_features, out_features, bias is not None, weight.group_size, format, "meta", dtype
        )._hold(weight, bias, layout)

    def _hold(self, weight: QuantizedWeight, bias: Tensor | None, layout: str | None) -> Self:
        """Itself, with a weight and bias of its shape in place of its empty buffers."""
        self.layout = layout or self.format
        for name, tensor in get_layout(self.layout).pack(weight).items():
            self.register_buffer(name, tensor)
        if bias is not None:
            self.register_buffer("bias", bias.detach().clone())

        return self

    @property
    def packed(self) -> Packed:
        """The packed tensors as backends take them."""
        shape = Shape(self.in_features, self.out_features, self.group_size)
        with _changing:
            return Packed(self.qweight, self.qzeros, self.scales, shape, self.layout)

    def quantized(self) -> QuantizedWeight:
        """The canonical weight, exactly."""
        return self.packed.unpack()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dense weight [out, in]."""
        return self.quantized().dequantize(dtype)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """`qweight`, `qzeros` and `scales` as a checkpoint of `format` holds them."""
        with _changing:
            packed = self.packed
            kept = self._kept

        if packed.layout == self.format:
            return {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales}

        tensors = get_format(self.format).pack(packed.unpack())
        device = packed.qweight.device
        for name, tensor in kept.items():
            tensors[name] = tensor.to(device)

        return tensors

    def set_layout(self, layout: str) -> None:
        """Moves the weight to another layout, in place and without loss; the old buffers are freed.

        Forwards that run meanwhile finish on the tensors that they began with.
        """
        # Tensors made in inference mode could not be used by a backward pass later.
        with _changing, torch.inference_mode(False), torch.no_grad():
            if layout != self.layout:
                self._change_layout(layout)

    def _change_layout(self, layout: str) -> None:
        before = self.checkpoint_tensors()
        if layout == self.format:
            after, self._kept = before, {}
        else:
            codec = get_format(self.format)
            weight = codec.unpack(before, self.in_features, self.out_features, self.group_size)
            after = get_layout(layout).pack(weight)
            again = before if codec.bijective else codec.pack(weight)

            # Padding that is not zero, or scaled zeros rounded otherwise: rare, small, and needed
            # to save the same bytes.
            self._kept = {
                n: t.cpu()
                for n, t in before.items()
                if t is not again[n]
                and not torch.equal(t.view(torch.uint8), again[n].view(torch.uint8))
            }

        self._buffers.update(after)
        self.layout = layout

    def settle(self, dtype: torch.dtype) -> Packed:
        """Moves the weight to the layout that the backend for its device and for activations of
        `dtype` computes on.

        Returns the tensors to compute with. On the meta device and inside a CUDA graph capture
        nothing moves.
        """
        with _changing:
            qweight = self._buffers["qweight"]
            assert qweight is not None
            if qweight.is_meta or (qweight.is_cuda and torch.cuda.is_current_stream_capturing()):
                return self.packed

            self._recognize(qweight)
            self.dtype = dtype
            shape = Shape(self.in_features, self.out_features, self.group_size)
            self.set_layout(layout_for(qweight.device, dtype, shape) or self.layout)
            self._settled = self.packed

            return self._settled

    def _recognize(self, qweight: Tensor) -> None:
        """Hooks that offload weights put tensors of the checkpoint's layout back behind the
        module's back."""
        shape, dtype = get_format(self.format).shapes(
            self.in_features, self.out_features, self.group_size
        )["qweight"]
        if self.layout != self.format and tuple(qweight.shape) == shape and qweight.dtype == dtype:
            self.layout = self.format

    def forward(self, x: Tensor) -> Tensor:
        # From the dict: an attribute of a module that is a buffer costs half a microsecond, and a
        # decode step has thousands.
        t: Any = self._buffers
        qweight = t["qweight"]
        qzeros = t["qzeros"]
        scales = t["scales"]
        layout = self.layout

        if not torch.compiler.is_compiling():
            settled = self._settled
            if (
                settled is None
                or qweight is not settled[0]
                or qzeros is not settled[1]
                or scales is not settled[2]
            ):
                settled = self.settle(x.dtype)

            qweight, qzeros, scales, _, layout = settled

        return quantized_linear(
            x,
            qweight,
            qzeros,
            scales,
            t["bias"],
            self.in_features,
            self.out_features,
            self.group_size,
            layout,
        )

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: tensors and the layout that they have, even while another thread
        changes it."""
        with _changing:
            return self.__dict__ | {"_buffers": dict(self._buffers), "_settled": None}

    def _save_to_state_dict(
        self,
        destination: dict[str, Any],
        prefix: str,
        keep_vars: bool,
    ) -> None:
        tensors = self.checkpoint_tensors()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in tensors.items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(prefix + name in state_dict for name in PACKED_TENSORS):
            with _changing:
                self.set_layout(self.format)
                self._settled = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WQLinear:
        kept = {
            name: t
            for name, t in self._buffers.items()
            if name != "bias" and t is not None and t.is_floating_point()
        }
        self._settled = None  # it would keep the old tensors alive
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype

        for name, old in kept.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)

        return self

    def __getattr__(self, name: str) -> Any:
        # Models ask linears for their weight's dtype, device or shape (T5's MLP does); there is
        # none to compute with.
        if name == "weight" and "_buffers" in self.__dict__:
            qweight = self._buffers["qweight"]
            assert qweight is not None
            nothing = torch.empty((), device=qweight.device, dtype=self.dtype).expand(
                self.out_features, self.in_features
            )

            return metadata_view(nothing, _no_weight)
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, "
            f"group_size={self.group_size}, format={self.format}, layout={self.layout}"
        )
