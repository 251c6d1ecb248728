"""Experts of a mixture as ordinary linears, and back: `ExpertLinears`.

transformers 5 holds all experts of a layer in two 3-D parameters (`gate_up_proj` and `down_proj`)
behind one contract: `forward(hidden_states [tokens, hidden], top_k_index [tokens, top_k],
top_k_weights [tokens, top_k])`. Quantization works on
linears: it looks for what reads one tensor, proves folds, gathers a Gram matrix for each input. So
before it begins, `expose_experts` puts an `ExpertLinears` in the place of every such module. Its
children are one small module per expert with `gate`, `up` and `down` linears, whose weights are
views of the 3-D parameters. `conceal_experts` puts the original back.

What the class of experts does between its products (clamped gates, interleaved rows, a norm behind
the expert) stays that class's own code: the emptied original module is kept and its `_apply_gate`,
`act_fn` and `post_expert_norm` are called. Nothing here knows a model by name; `expose_experts`
compares the outputs of both modules on random tokens and leaves a module alone whose outputs
differ.

A few classes keep the parameters without the flags of transformers' contract. Their flags are read
off shapes and signature. Llama 4's takes *sorted rows* in one argument, `forward(hidden_states
[experts · tokens, hidden])`: every expert has a row for every token, weighted by the router
beforehand, and zero where the token is not routed to it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from awq.nn.surgery import replace_module

logger = logging.getLogger("awq.nn")

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # of transformers' contract
_TRIAL_TOKENS = 16
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_TOLERANCE_16_BIT = 0.03


class ExpertNames(NamedTuple):
    """What the three linears of an expert are called, below the expert's number ("w1", "w3",
    "w2")."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class ExpertShape:
    """How a class of experts stores its weights.

    has_gate: gate and up share one parameter; interleaved: their rows alternate instead of
    following each other;
    transposed: weights are [experts, in, out]; has_bias: there are biases [experts, out] beside
    them; sorted_rows: the forward takes every expert's rows in turn, and no choice of experts;
    identities: numbers from `num_experts` on that hand a token on as it is.
    """

    num_experts: int
    hidden: int
    inner: int
    has_gate: bool = True
    interleaved: bool = False
    transposed: bool = False
    has_bias: bool = False
    sorted_rows: bool = False
    identities: int = 0

    def join(self, gate: Tensor, up: Tensor, dim: int) -> Tensor:
        """Gate and up beside each other along `dim`, as the class's activation takes them."""
        if not self.interleaved:
            return torch.cat([gate, up], dim)
        dim = dim % gate.dim()
        return torch.stack([gate, up], dim + 1).flatten(dim, dim + 1)

    def split(self, joined: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """(gate, up) as views; the inverse of `join`."""
        if not self.interleaved:
            half = joined.shape[dim] // 2
            return joined.narrow(dim, 0, half), joined.narrow(dim, half, half)
        index: list[Any] = [slice(None)] * joined.dim()
        index[dim] = slice(0, None, 2)
        gate = joined[tuple(index)]
        index[dim] = slice(1, None, 2)
        return gate, joined[tuple(index)]


def shape_of_experts(module: nn.Module) -> ExpertShape | None:
    """The shape of a module that holds experts as 3-D parameters behind a contract that is known
    here, or None."""
    has_gate = bool(getattr(module, "has_gate", "gate_up_proj" in module._parameters))
    up = module._parameters.get("gate_up_proj" if has_gate else "up_proj")
    down = module._parameters.get("down_proj")
    if up is None or down is None or up.dim() != 3 or down.dim() != 3 or len(up) < len(down):
        return None
    sorted_rows = _takes_sorted_rows(module)
    if sorted_rows is None:
        return None
    parts = 2 if has_gate else 1
    # [experts, parts · inner, hidden] beside [experts, hidden, inner], or the last two axes of both
    # exchanged
    transposed = bool(
        getattr(
            module,
            "is_transposed",
            up.shape[2] == parts * down.shape[1] and up.shape[1] == down.shape[2],
        )
    )
    inner, hidden = (down.shape[1], down.shape[2]) if transposed else (down.shape[2], down.shape[1])
    rows = up.shape[2] if transposed else up.shape[1]
    if rows != parts * inner:
        return None
    interleaved = not getattr(module, "is_concatenated", True)
    has_bias = bool(getattr(module, "has_bias", "down_proj_bias" in module._parameters))
    identities = len(up) - len(down)
    return ExpertShape(
        len(down),
        hidden,
        inner,
        has_gate,
        interleaved,
        transposed,
        has_bias,
        sorted_rows,
        identities,
    )


def _takes_sorted_rows(module: nn.Module) -> bool | None:
    """Whether the forward takes rows sorted by expert; False: tokens and their choice of experts;
    None: something else."""
    if all(hasattr(module, flag) for flag in _FLAGS):
        return False
    given = list(inspect.signature(type(module).forward).parameters)[1:]
    if given[:3] == ["hidden_states", "top_k_index", "top_k_weights"]:
        return False
    return True if given == ["hidden_states"] else None


class ExpertRules(nn.Module):
    """What `ExpertLinears` and the packed experts share: the contract of the class whose weights
    they hold.

    The original module, without its weights, answers for every attribute that is asked of its
    successor.
    """

    def __init__(self, original: nn.Module, shape: ExpertShape, names: ExpertNames) -> None:
        super().__init__()
        first = original._parameters.get(weight_names(shape)[0])
        # Rows that stand for experts without weights are never read; they go back as they were.
        self._unread = (
            first.data[shape.num_experts :].clone()
            if shape.identities and first is not None
            else None
        )
        for name in weight_names(shape):
            original._parameters.pop(name, None)
        for name, child in original.named_children():
            self.add_module(name, child)
        for name, parameter in original.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        # in a tuple: not a child, so that its parts are not counted twice
        self._original = (original,)
        self.shape, self.names = shape, names

    @property
    def original(self) -> nn.Module:
        """The emptied module of transformers."""
        return self._original[0]

    def activate(self, joined: Tensor) -> Tensor:
        """From the first product's outputs [..., 2 · inner] (or [..., inner]) to the second's
        inputs [..., inner]."""
        original: Any = self.original
        if not self.shape.has_gate:
            return original.act_fn(joined)
        if hasattr(original, "_apply_gate"):
            return original._apply_gate(joined)
        gate, up = self.shape.split(joined, -1)
        return original.act_fn(gate) * up

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


def weight_names(shape: ExpertShape) -> list[str]:
    """Names of the parameters that hold all experts, gate and up first."""
    names = ["gate_up_proj" if shape.has_gate else "up_proj", "down_proj"]
    return names + [f"{name}_bias" for name in names if shape.has_bias]


class ExpertLinears(ExpertRules):
    """The experts of one layer as children "0", "1", …, each with linears of the given names.

    every_token: all experts run on all tokens and what is not routed is weighted by zero, so that
    they read *one* tensor and none is left out; for discovery and proof of folds. watch: called as
    `watch(expert, tokens, weights)` before an expert runs on its routed tokens (int64 [n] and float
    [n]).
    """

    def __init__(
        self, original: nn.Module, shape: ExpertShape, names: ExpertNames | None = None
    ) -> None:
        weights = {name: original._parameters.get(name) for name in weight_names(shape)}
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
        """[tokens, hidden] → [tokens, hidden]; weighted and added up in float32. Without a choice:
        of sorted rows."""
        if top_k_index is None or top_k_weights is None:
            return self._of_sorted_rows(hidden_states)
        total = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        for number in range(self.shape.num_experts):
            chosen = top_k_index == number
            if self.every_token:
                weight = (top_k_weights * chosen).sum(-1, keepdim=True)
                total = total + self.run_expert(number, hidden_states).float() * weight.float()
                continue
            tokens, slots = torch.where(chosen)
            if not len(tokens):
                continue
            weight = top_k_weights[tokens, slots]
            if self.watch is not None:
                self.watch(number, tokens, weight)
            part = self.run_expert(
                number, hidden_states[tokens]
            ).float() * weight.float().unsqueeze(-1)
            total = total.index_add(0, tokens, part)
        if self.shape.identities:
            total = total + self.handed_on(hidden_states, top_k_index, top_k_weights)
        return total.to(hidden_states.dtype)

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
            return x, mask
        real = x.any(-1)
        if mask is not None:
            real = real & mask.reshape(-1).repeat(self.shape.num_experts)
        return x[real], None


def _expert(
    weights: Mapping[str, Tensor | None], number: int, shape: ExpertShape, names: ExpertNames
) -> nn.Module:
    """One expert's linears, as views of the 3-D weights."""
    first = "gate_up_proj" if shape.has_gate else "up_proj"
    expert = nn.Module()
    parts: dict[str, tuple[Tensor, Tensor | None]] = {}
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


def _matrix(
    weights: Mapping[str, Tensor | None], name: str, number: int, shape: ExpertShape
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


def fused_experts(model: nn.Module) -> dict[str, ExpertShape]:
    """Name → shape of every module that holds experts as 3-D parameters behind a contract that is
    known here."""
    shapes = {name: shape_of_experts(module) for name, module in model.named_modules()}
    return {name: shape for name, shape in shapes.items() if shape is not None}


Judge = Callable[[str, nn.Module, ExpertShape], "str | None"]


@torch.no_grad()
def expose_experts(
    model: nn.Module,
    names: Mapping[str, ExpertNames] | None = None,
    judge: Judge | None = None,
) -> dict[str, str]:
    """Puts an `ExpertLinears` in the place of every module of fused experts; returns module name →
    why it was left alone.

    names: what each module's linears are called in checkpoints; only modules named here are
    exposed, None means all. The first module of every class is tried on random tokens, or asked
    `judge` for (arguments: name, module, shape), where the weights are elsewhere.
    """
    left: dict[str, str] = {}
    verdicts: dict[Any, str | None] = {}
    for name, shape in fused_experts(model).items():
        if names is not None and name not in names:
            continue
        original = model.get_submodule(name)
        kind = type(original), shape
        if kind not in verdicts:
            verdicts[kind] = (
                why_not_expose(original, shape) if judge is None else judge(name, original, shape)
            )
        reason = verdicts[kind]
        if reason is not None:
            left[name] = reason
            continue
        replace_module(model, name, ExpertLinears(original, shape, (names or {}).get(name)))
    return left


def why_not_expose(original: nn.Module, shape: ExpertShape) -> str | None:
    """None when the experts as linears compute what the original computes."""
    example = next(original.parameters())
    if example.is_meta:
        return None
    trial = _trial_inputs(shape, example)
    kept = dict(original._parameters)
    try:
        expected = original(*trial).float()
        found = ExpertLinears(original, shape)(*trial).float()
    except Exception as error:  # someone else's forward: what it wants more is not known here
        return f"its experts cannot be tried: {type(error).__name__}: {error}"
    finally:
        original._parameters.clear()
        original._parameters.update(kept)
    change = float((found - expected).norm() / expected.norm().clamp(min=1e-20))
    if change <= _TOLERANCE.get(example.dtype, _TOLERANCE_16_BIT):
        return None
    return f"its experts as linears differ from {type(original).__name__} by {change:.1e}"


def _trial_inputs(shape: ExpertShape, example: Tensor) -> tuple[Tensor, ...]:
    """Arguments of a forward over a few random tokens, in the dtype and on the device of
    `example`."""
    generator = torch.Generator().manual_seed(0)
    if shape.sorted_rows:
        x = torch.randn(_TRIAL_TOKENS * shape.num_experts, shape.hidden, generator=generator)
        return (x.to(example.device, example.dtype),)
    top_k = min(2, shape.num_experts)
    x = torch.randn(_TRIAL_TOKENS, shape.hidden, generator=generator)
    order = torch.rand(
        _TRIAL_TOKENS, shape.num_experts + shape.identities, generator=generator
    ).argsort(-1)
    weights = torch.rand(_TRIAL_TOKENS, top_k, generator=generator)
    x, weights = (tensor.to(example.device, example.dtype) for tensor in (x, weights))
    return x, order[:, :top_k].to(example.device), weights


@torch.no_grad()
def conceal_experts(model: nn.Module) -> None:
    """Puts the original module back where all of an `ExpertLinears` is dense still; weights are
    copied into one tensor."""
    for name, experts in named_experts(model).items():
        linears = [
            linear
            for n in range(experts.shape.num_experts)
            for linear in experts.linears(n)
            if linear is not None
        ]
        if all(isinstance(linear, nn.Linear) for linear in linears):
            replace_module(model, name, _fused(experts))


def _fused(experts: ExpertLinears) -> nn.Module:
    shape = experts.shape
    triples = [experts.linears(number) for number in range(shape.num_experts)]
    weights = [
        [None if m is None else cast(Tensor, m.weight) for m in triple] for triple in triples
    ]
    biases = None
    if shape.has_bias:
        biases = [
            [None if m is None else cast(Tensor, m.bias) for m in triple] for triple in triples
        ]
    return restore_original(experts, weights, biases)


def restore_original(
    rules: ExpertRules, weights: list[list[Tensor | None]], biases: list[list[Tensor | None]] | None
) -> nn.Module:
    """The module of transformers with dense weights again.

    weights: for every expert [gate or None, up, down], each [out, in]; biases likewise, each [out].
    """
    shape, original = rules.shape, rules.original
    first = "gate_up_proj" if shape.has_gate else "up_proj"
    for ending, triples in (("", weights), ("_bias", biases)):
        if triples is None:
            continue
        joined, downs = [], []
        for gate, up, down in triples:
            assert up is not None and down is not None
            joined.append(up if gate is None else shape.join(gate, up, 0))
            downs.append(down)
        for name, tensors in ((first, joined), ("down_proj", downs)):
            stacked = torch.stack(tensors)
            if name == first and rules._unread is not None and not ending:
                stacked = torch.cat([stacked, rules._unread.to(stacked)])
            if shape.transposed and not ending:
                stacked = stacked.transpose(1, 2).contiguous()
            original.register_parameter(name + ending, nn.Parameter(stacked, requires_grad=False))
    return original


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
