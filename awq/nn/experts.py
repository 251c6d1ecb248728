"""Experts of a mixture as ordinary linears: `ExpertLinears`.

Quantization works on linears: it looks for what reads one tensor, proves folds, gathers a Gram
matrix for each input. transformers 5 holds experts in 3-D parameters (`awq.nn.expert_shape`). The
children of an `ExpertLinears` are one small module per expert with `gate`, `up` and `down` linears,
whose weights are views of the 3-D parameters; `awq.nn.expose` puts it in the place of a module of
experts, and the original back.

What the class of experts does between its products (clamped gates, interleaved rows, a norm behind
the expert) stays that class's own code: the emptied original module is kept and its `_apply_gate`,
`act_fn` and `post_expert_norm` are called. Nothing here knows a model by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from awq.nn.expert_shape import (
    ExpertNames,
    ExpertShape,
    activation_of,
    holder_of,
    weight_names,
)


class ExpertRules(nn.Module):
    """What `ExpertLinears` and the packed experts share: the contract of the class whose weights
    they hold.

    The original module, without its weights, answers for every attribute that is asked of its
    successor.
    """

    def __init__(self, original: nn.Module, shape: ExpertShape, names: ExpertNames) -> None:
        super().__init__()
        first = _stored(original, shape)[weight_names(shape)[0]]

        # Rows that stand for experts without weights are never read; they go back as they were.
        self._unread: Tensor | None = None
        if shape.identities and first is not None:
            self._unread = first.data[shape.num_experts :].clone()

        for name in weight_names(shape):
            holder, leaf = holder_of(original, name)
            holder._parameters.pop(leaf, None)

        for name, child in original.named_children():
            self.add_module(name, child)
        for name, parameter in original.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

        # in a tuple: not a child, so that its parts are not counted twice
        self._original = (original,)
        self.shape = shape
        self.names = names

    @property
    def original(self) -> nn.Module:
        """The emptied module of transformers."""
        return self._original[0]

    def activate(self, joined: Tensor) -> Tensor:
        """From the first product's outputs [..., 2 · inner] (or [..., inner]) to the second's
        inputs [..., inner]."""
        original: Any = self.original
        if not self.shape.has_gate:
            return activation_of(original)(joined)
        if hasattr(original, "_apply_gate"):
            return original._apply_gate(joined)

        gate, up = self.shape.split(joined, -1)
        return activation_of(original)(gate) * up

    def handed_on(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """What experts without weights add to the output: x [tokens, hidden] times their share,
        float32."""
        share = (weights * (index >= self.shape.num_experts)).sum(-1, keepdim=True)
        return x.float() * share.float()

    def finish(self, output: Tensor) -> Tensor:
        """What the class does with an expert's output before it is weighted."""
        original: Any = self.original
        return original.post_expert_norm(output) if self.has_norm else output

    @property
    def has_norm(self) -> bool:
        return bool(getattr(self.original, "has_post_expert_norm", False))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_original" not in self.__dict__:
                raise
            return getattr(self.__dict__["_original"][0], name)


class ExpertLinears(ExpertRules):
    """The experts of one layer as children "0", "1", …, each with linears of the given names.

    every_token: all experts run on all tokens and what is not routed is weighted by zero, so that
    they read *one* tensor and none is left out; for discovery and proof of folds. watch: called as
    `watch(expert, tokens, weights)` before an expert runs on its routed tokens (int64 [n] and float
    [n]).
    """

    def __init__(
        self,
        original: nn.Module,
        shape: ExpertShape,
        names: ExpertNames | None = None,
    ) -> None:
        weights = _stored(original, shape)
        super().__init__(original, shape, names or ExpertNames())
        self.every_token = False
        self.watch: Callable[[int, Tensor, Tensor], None] | None = None
        for number in range(shape.num_experts):
            self.add_module(str(number), _expert(weights, number, shape, self.names))

    def expert(self, number: int) -> nn.Module:
        return cast(nn.Module, self._modules[str(number)])

    def linears(self, number: int) -> tuple[nn.Module | None, nn.Module, nn.Module]:
        """(gate, up, down) of one expert; no gate where the class has none."""
        expert = self.expert(number)
        gate = expert.get_submodule(self.names.gate) if self.shape.has_gate else None
        return gate, expert.get_submodule(self.names.up), expert.get_submodule(self.names.down)

    def run_expert(self, number: int, x: Tensor) -> Tensor:
        """One expert on tokens [n, hidden], unweighted."""
        gate, up, down = self.linears(number)
        first = up(x) if gate is None else self.shape.join(gate(x), up(x), -1)
        return self.finish(down(self.activate(first)))

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """[..., hidden] → the same; weighted and added up in float32. Without a choice: of sorted
        rows."""
        if top_k_index is None or top_k_weights is None:
            return self._of_sorted_rows(hidden_states)

        shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, self.shape.hidden)
        total = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        for number in range(self.shape.num_experts):
            chosen = top_k_index == number
            if self.every_token:
                weight = (top_k_weights * chosen).sum(-1, keepdim=True)
                part = self.run_expert(number, hidden_states).float()
                total = total + part * weight.float()
                continue

            tokens, slots = torch.where(chosen)
            if not len(tokens):
                continue

            weight = top_k_weights[tokens, slots]
            if self.watch is not None:
                self.watch(number, tokens, weight)
            part = self.run_expert(number, hidden_states[tokens]).float()
            part = part * weight.float().unsqueeze(-1)
            total = total.index_add(0, tokens, part)

        if self.shape.identities:
            total = total + self.handed_on(hidden_states, top_k_index, top_k_weights)
        return total.to(hidden_states.dtype).view(shape)

    def _of_sorted_rows(self, hidden_states: Tensor) -> Tensor:
        """[experts · tokens, hidden] → the same; what is not routed to an expert is a row of zeros
        there, and stays one."""
        parts = hidden_states.view(self.shape.num_experts, -1, self.shape.hidden)
        output = torch.zeros_like(parts)
        for number, rows in enumerate(parts):
            if self.every_token:
                output[number] = self.run_expert(number, rows)
                continue

            tokens = rows.any(-1).nonzero().squeeze(-1)
            if self.watch is not None:
                self.watch(number, tokens, torch.ones_like(tokens, dtype=torch.float32))
            if len(tokens):
                output[number, tokens] = self.run_expert(number, rows[tokens])

        return output.view(-1, self.shape.hidden)

    def layer_inputs(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What all experts of the layer read [n, hidden], and which of it are real tokens, bool [n]
        or None.

        x: the argument of `forward`; mask: bool [batch, tokens] of real tokens.
        """
        if not self.shape.sorted_rows:
            return x.reshape(-1, self.shape.hidden), mask

        real = x.any(-1)
        if mask is not None:
            for_every_expert = mask.reshape(-1).repeat(self.shape.num_experts)
            real = real & for_every_expert

        return x[real], None


def _expert(
    weights: Mapping[str, Tensor | None],
    number: int,
    shape: ExpertShape,
    names: ExpertNames,
) -> nn.Module:
    """One expert's linears, as views of the stacked weights."""
    first = "gate_up_proj" if shape.has_gate else "up_proj"
    expert = nn.Module()
    parts: dict[str, tuple[Tensor, Tensor | None]] = {}
    if shape.stacks:
        views = [_slice(weights[name], number, shape) for name in shape.stacks]
        views[-1] = views[-1].t()
        for name, view in zip((names.gate, names.up, names.down), views):
            _put(expert, name, _linear(view, None))
        return expert

    up, up_bias = _matrix(weights, first, number, shape)

    if shape.has_gate:
        gate, up = shape.split(up, 0)
        gate_bias = None
        if up_bias is not None:
            gate_bias, up_bias = shape.split(up_bias, 0)
        parts[names.gate] = gate, gate_bias

    parts[names.up] = up, up_bias
    parts[names.down] = _matrix(weights, "down_proj", number, shape)
    for name, (weight, bias) in parts.items():
        _put(expert, name, _linear(weight, bias))

    return expert


def _stored(original: nn.Module, shape: ExpertShape) -> dict[str, Tensor | None]:
    """Name → parameter of what holds all experts; None for what the class has not."""
    found: dict[str, Tensor | None] = {}
    for name in weight_names(shape):
        holder, leaf = holder_of(original, name)
        found[name] = holder._parameters.get(leaf)
    return found


def _slice(stack: Tensor | None, number: int, shape: ExpertShape) -> Tensor:
    """One expert's rows [inner, hidden] of a stack."""
    return cast(Tensor, stack).data[number * shape.inner : (number + 1) * shape.inner]


def _matrix(
    weights: Mapping[str, Tensor | None],
    name: str,
    number: int,
    shape: ExpertShape,
) -> tuple[Tensor, Tensor | None]:
    """(weight [out, in], bias [out] or None) of one expert, as views."""
    weight = cast(Tensor, weights[name]).data[number]
    bias = weights.get(f"{name}_bias")
    return (weight.t() if shape.transposed else weight), (
        None if bias is None else bias.data[number]
    )


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    """A module under a dotted name, with the modules on the way."""
    *way, leaf = name.split(".")
    for part in way:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = cast(nn.Module, root._modules[part])

    root.add_module(leaf, module)


def named_experts(model: nn.Module) -> dict[str, ExpertLinears]:
    """Name → exposed experts, of a whole model or of one block."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, ExpertLinears)
    }


@contextmanager
def every_token(root: nn.Module) -> Iterator[None]:
    """Inside, exposed experts below `root` run on every token (see `ExpertLinears`)."""
    members = list(named_experts(root).values())
    for member in members:
        member.every_token = True
    try:
        yield
    finally:
        for member in members:
            member.every_token = False


def expert_of(block: nn.Module, name: str) -> tuple[str, int] | None:
    """(name of the exposed experts, expert's number) that the linear `name` of a block belongs to,
    or None."""
    module: nn.Module | None = block
    parts = name.split(".")
    for place, part in enumerate(parts):
        if isinstance(module, ExpertLinears):
            return (".".join(parts[:place]), int(part)) if part.isdigit() else None
        module = None if module is None else module._modules.get(part)

    return None
