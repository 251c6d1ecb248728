"""`AwqExperts`: all experts of a layer, packed, in one module behind transformers' contract for
experts.

The weights of all experts are stacked along a leading axis, gate and up joined as the class's
activation takes them, and computed by `awq::moe_linear`: one call for the first product, one for
the second with its weighted sum. A checkpoint never shows the stacks. `state_dict` speaks of one
packed linear per expert (`3.w1.qweight`), as every reader expects, and is made from the canonical
weight, so that saving what was loaded gives the same bytes.

Checkpoints are loaded into an `ExpertLinears` of packed linears, of the names that the files have,
and `pack_experts` makes one `AwqExperts` of each afterwards, layer by layer: nothing dense exists
on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from awq.config import PACKED_TENSORS
from awq.core.weight import QuantizedWeight
from awq.formats import get_format, get_layout
from awq.kernels import Packed, Shape, layout_for
from awq.kernels.moe import expert_of, moe_linear
from awq.nn.expert_shape import ExpertNames, ExpertShape
from awq.nn.experts import ExpertLinears, ExpertRules, named_experts
from awq.nn.expose import restore_original
from awq.nn.linear import WQLinear, layouts_stay
from awq.nn.surgery import replace_module


class ExpertStack(nn.Module):
    """One product of all experts: buffers `qweight`, `qzeros`, `scales` [experts, …] in `layout`,
    and `bias` [experts, out].

    format: the layout of the checkpoint, kept for saving.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weights: Sequence[QuantizedWeight],
        biases: Sequence[Tensor] | None,
        format: str,
        layout: str,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weights[0].codes.shape
        self.group_size = weights[0].group_size
        self.num_experts = len(weights)
        self.format = format
        self.layout = layout
        self._settled: Tensor | None = None

        # Not persistent: a checkpoint shows each expert by itself
        # (`AwqExperts.checkpoint_tensors`).
        for kind in PACKED_TENSORS:
            self.register_buffer(kind, None, persistent=False)
        self.register_buffer(
            "bias", None if biases is None else torch.stack(list(biases)), persistent=False
        )
        self._hold(list(weights), layout)

    def _hold(self, weights: list[QuantizedWeight], layout: str) -> None:
        packed = [get_layout(layout).pack(weight) for weight in weights]
        stacks = {k: torch.stack([tensors[k] for tensors in packed]) for k in PACKED_TENSORS}
        with layouts_stay():
            self._buffers.update(stacks)
            self.layout = layout

    def load(self, weights: list[QuantizedWeight], biases: list[Tensor]) -> None:
        """Other weights of the same shapes, in the layout of now."""
        self._hold(weights, self.layout)
        if self.bias is not None:
            self.bias.copy_(torch.stack(biases))

    @property
    def packed(self) -> Packed:
        """The stack as `moe_linear` takes it."""
        shape = Shape(self.in_features, self.out_features, self.group_size)
        with layouts_stay():
            return Packed(self.qweight, self.qzeros, self.scales, shape, self.layout)

    def weight_of(self, number: int) -> QuantizedWeight:
        """One expert's canonical weight, exactly."""
        return expert_of(self.packed, number).unpack()

    def bias_of(self, number: int) -> Tensor | None:
        return None if self.bias is None else self.bias[number]

    def set_layout(self, layout: str) -> None:
        """Moves all experts to another layout, without loss; the old buffers are freed. Forwards
        that run meanwhile finish on the tensors that they began with."""
        with layouts_stay():
            if layout != self.layout:
                self._hold([self.weight_of(number) for number in range(self.num_experts)], layout)

    def settle(self, dtype: torch.dtype) -> None:
        """Moves the weights to the layout that the backend for their device and for activations of
        `dtype` computes on."""
        qweight = self.qweight
        if qweight.is_meta or (qweight.is_cuda and torch.cuda.is_current_stream_capturing()):
            return

        shape = Shape(self.in_features, self.out_features, self.group_size)
        self.set_layout(layout_for(qweight.device, dtype, shape) or self.layout)
        self._settled = self.qweight

    def ready(self, dtype: torch.dtype) -> Packed:
        """`packed`, in the layout of the backend that serves activations of `dtype`."""
        if not torch.compiler.is_compiling() and self._settled is not self.qweight:
            self.settle(dtype)
        return self.packed

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor | None = None) -> Tensor:
        """`moe_linear` with these weights."""
        return moe_linear(x, self.ready(x.dtype), experts, weights, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertStack:
        scales = {
            name: tensor
            for name, tensor in self._buffers.items()
            if name in PACKED_TENSORS and tensor is not None
        }
        super()._apply(fn, recurse)
        for name, old in scales.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)

        return self

    def extra_repr(self) -> str:
        return (
            f"experts={self.num_experts}, in_features={self.in_features}, "
            f"out_features={self.out_features}, "
            f"group_size={self.group_size}, bias={self.bias is not None}, layout={self.layout}"
        )


class AwqExperts(ExpertRules):
    """The packed experts of one layer: `first` (gate and up joined, or up) and `second` (down)."""

    def __init__(
        self,
        original: nn.Module,
        shape: ExpertShape,
        names: ExpertNames,
        first: ExpertStack,
        second: ExpertStack,
    ) -> None:
        """original: transformers' module, which loses its weights."""
        super().__init__(original, shape, names)
        self.first = first
        self.second = second

    @classmethod
    def from_linears(cls, linears: ExpertLinears) -> AwqExperts:
        """From exposed experts whose linears are all packed, alike; these are emptied."""
        triples = [linears.linears(number) for number in range(linears.shape.num_experts)]
        first = _first_stack(linears, triples)
        second = _stack([cast(WQLinear, down) for _, _, down in triples])
        made = cls(linears.original, linears.shape, linears.names, first, second)
        return made.train(linears.training)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """[..., hidden] → the same. top_k_index: int [tokens, top_k]; top_k_weights: float [tokens,
        top_k].

        Without a choice of experts: of rows sorted by expert, [experts · tokens, hidden].
        """
        if top_k_index is None or top_k_weights is None:
            owners = torch.arange(self.shape.num_experts, device=hidden_states.device)
            owner = owners.repeat_interleave(
                len(hidden_states) // self.shape.num_experts
            ).unsqueeze(1)
            inner = self.activate(self.first(hidden_states, owner))

            return self.finish(self.second(inner, owner)).squeeze(1)

        rows = hidden_states.reshape(-1, self.shape.hidden)
        return self._of_choice(rows, top_k_index, top_k_weights).view(hidden_states.shape)

    def _of_choice(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """`forward` of rows [tokens, hidden] with their choice of experts."""
        if self.shape.identities:
            return self._with_identities(x, index, weights)

        inner = self.activate(self.first(x, index))
        if not self.has_norm:
            return self.second(inner, index, weights)

        output = self.finish(self.second(inner, index))
        return (output.float() * weights.float().unsqueeze(-1)).sum(1).to(x.dtype)

    def _with_identities(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """`forward` where some of the chosen experts have no weights: any other runs in their
        place, weighted by zero."""
        known = index.clamp(max=self.shape.num_experts - 1)
        inner = self.activate(self.first(x, known))
        output = self.second(inner, known, weights * (index < self.shape.num_experts))
        return (output.float() + self.handed_on(x, index, weights)).to(x.dtype)

    def weights_of(self, number: int) -> dict[str, tuple[QuantizedWeight, Tensor | None]]:
        """Name ("w1") → (canonical weight, bias) of one expert's linears, as a checkpoint holds
        them."""
        names = self.names
        first = self.first.weight_of(number)
        bias = self.first.bias_of(number)

        found: dict[str, tuple[QuantizedWeight, Tensor | None]] = {}
        if self.shape.has_gate:
            gate, up = _parted(self.shape, first)
            gate_bias, up_bias = (None, None) if bias is None else self.shape.split(bias, 0)
            found[names.gate] = gate, gate_bias
            found[names.up] = up, up_bias
        else:
            found[names.up] = first, bias

        down_bias = self.second.bias_of(number)
        found[names.down] = self.second.weight_of(number), down_bias

        return found

    def linear_names(self) -> list[str]:
        """Names of all experts' linears below this module ("3.w1"), as a checkpoint has them."""
        gate = [self.names.gate] if self.shape.has_gate else []
        parts = [*gate, self.names.up, self.names.down]
        return [f"{number}.{part}" for number in range(self.shape.num_experts) for part in parts]

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Tensors as a checkpoint holds them, below the name of this module ("3.w1.qweight")."""
        codec = get_format(self.first.format)
        tensors: dict[str, Tensor] = {}
        for number in range(self.shape.num_experts):
            for name, (weight, bias) in self.weights_of(number).items():
                packed = codec.pack(weight)
                tensors |= {f"{number}.{name}.{kind}": packed[kind] for kind in PACKED_TENSORS}
                if bias is not None:
                    tensors[f"{number}.{name}.bias"] = bias.contiguous()

        return tensors

    def dequantized(self, dtype: torch.dtype) -> nn.Module:
        """The module of transformers with dense weights."""
        parts = [self.weights_of(number) for number in range(self.shape.num_experts)]
        order = ([self.names.gate] if self.shape.has_gate else []) + [
            self.names.up,
            self.names.down,
        ]
        missing: list[Tensor | None] = [] if self.shape.has_gate else [None]
        weights = [missing + [part[name][0].dequantize(dtype) for name in order] for part in parts]
        if not self.shape.has_bias:
            return restore_original(self, weights, None)

        biases = [
            missing + [cast(Tensor, part[name][1]).to(dtype) for name in order] for part in parts
        ]
        return restore_original(self, weights, biases)

    def _save_to_state_dict(
        self,
        destination: dict[str, Any],
        prefix: str,
        keep_vars: bool,
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(
            {prefix + name: tensor for name, tensor in self.checkpoint_tensors().items()}
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list,
        unexpected: list,
        errors: list,
    ) -> None:
        ours = {prefix + name: tensor for name, tensor in self.checkpoint_tensors().items()}
        given = {name: state_dict[name] for name in ours if name in state_dict}
        rest = {name: tensor for name, tensor in state_dict.items() if name not in given}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        if not given:
            missing += list(ours)
            return
        self._load({name.removeprefix(prefix): tensor for name, tensor in (ours | given).items()})

    @torch.no_grad()
    def _load(self, tensors: dict[str, Tensor]) -> None:
        """Takes all experts' weights from checkpoint tensors ("3.w1.qweight")."""
        firsts = []
        seconds = []
        first_biases: list[Tensor] = []
        second_biases: list[Tensor] = []
        for number in range(self.shape.num_experts):
            up, up_bias = self._linear_of(tensors, number, self.names.up)
            down, down_bias = self._linear_of(tensors, number, self.names.down)
            if self.shape.has_gate:
                gate, gate_bias = self._linear_of(tensors, number, self.names.gate)
                up = _joined(self.shape, gate, up)
                if gate_bias is None or up_bias is None:
                    up_bias = None
                else:
                    up_bias = self.shape.join(gate_bias, up_bias, 0)

            firsts.append(up)
            seconds.append(down)
            if up_bias is not None and down_bias is not None:
                first_biases.append(up_bias)
                second_biases.append(down_bias)

        self.first.load(firsts, first_biases)
        self.second.load(seconds, second_biases)

    def _linear_of(
        self,
        tensors: dict[str, Tensor],
        number: int,
        name: str,
    ) -> tuple[QuantizedWeight, Tensor | None]:
        """(canonical weight, bias) of one expert's linear, out of checkpoint tensors."""
        home = self.second if name == self.names.down else self.first
        outputs = self.shape.inner if home is self.first else home.out_features
        prefix = f"{number}.{name}"
        device = self.first.qweight.device
        parts = {kind: tensors[f"{prefix}.{kind}"].to(device) for kind in PACKED_TENSORS}
        codec = get_format(self.first.format)
        weight = codec.unpack(parts, home.in_features, outputs, home.group_size)

        return weight, tensors.get(f"{prefix}.bias")


def _parted(shape: ExpertShape, first: QuantizedWeight) -> tuple[QuantizedWeight, QuantizedWeight]:
    """The gate and up of a joined weight, each in tensors of its own."""

    def part(number: int) -> QuantizedWeight:
        def of(tensor: Tensor) -> Tensor:
            return shape.split(tensor, 0)[number].contiguous()

        return QuantizedWeight(of(first.codes), of(first.scales), of(first.zeros))

    return part(0), part(1)


def _joined(shape: ExpertShape, gate: QuantizedWeight, up: QuantizedWeight) -> QuantizedWeight:
    codes, scales, zeros = (shape.join(a, b, 0) for a, b in zip(gate[:3], up[:3]))
    return QuantizedWeight(codes, scales, zeros)


def _first_stack(linears: ExpertLinears, triples: list[tuple[Any, Any, Any]]) -> ExpertStack:
    shape = linears.shape
    if not shape.has_gate:
        return _stack([up for _, up, _ in triples])

    weights = []
    biases = []
    for gate, up, _ in triples:
        weights.append(_joined(shape, gate.quantized(), up.quantized()))
        if gate.bias is not None:
            biases.append(shape.join(gate.bias, up.bias, 0))

    first_gate, *_ = triples[0]
    format = first_gate.format

    return ExpertStack(weights, biases or None, format, format)


def _stack(linears: list[WQLinear]) -> ExpertStack:
    weights = [linear.quantized() for linear in linears]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    form = linears[0].format
    return ExpertStack(weights, biases or None, form, form)


@torch.no_grad()
def pack_experts(model: nn.Module) -> int:
    """Makes one `AwqExperts` of every `ExpertLinears` whose linears are all packed, in place;
    returns how many there are."""
    made = 0
    for name, linears in named_experts(model).items():
        triples = [linears.linears(number) for number in range(linears.shape.num_experts)]
        if all(isinstance(m, WQLinear) for triple in triples for m in triple if m is not None):
            replace_module(model, name, AwqExperts.from_linears(linears))
            made += 1
    return made
