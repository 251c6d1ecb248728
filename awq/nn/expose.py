"""Puts `ExpertLinears` in the place of a model's fused experts, and the originals back.

Both modules' outputs are compared on random tokens; a module whose outputs differ is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from awq.nn.expert_shape import (
    ExpertNames,
    ExpertShape,
    fused_experts,
    holder_of,
    weight_names,
)
from awq.nn.experts import ExpertLinears, ExpertRules, named_experts
from awq.nn.surgery import replace_module

_TRIAL_TOKENS = 16
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_TOLERANCE_16_BIT = 0.03
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
    holders = [holder_of(original, name)[0] for name in weight_names(shape)]
    kept = {holder: dict(holder._parameters) for holder in (original, *holders)}
    try:
        expected = original(*trial).float()
        found = ExpertLinears(original, shape)(*trial).float().view_as(expected)
    except Exception as error:  # someone else's forward: what it wants more is not known here
        return f"its experts cannot be tried: {type(error).__name__}: {error}"
    finally:
        for holder, parameters in kept.items():
            holder._parameters.clear()
            holder._parameters.update(parameters)

    change = float((found - expected).norm() / expected.norm().clamp(min=1e-20))
    if change <= _TOLERANCE.get(example.dtype, _TOLERANCE_16_BIT):
        return None
    return f"its experts as linears differ from {type(original).__name__} by {change:.1e}"


def _trial_inputs(shape: ExpertShape, example: Tensor) -> tuple[Tensor, ...]:
    """Arguments of a forward over a few random tokens, in the dtype and on the device of
    `example`."""
    generator = torch.Generator().manual_seed(0)
    if shape.sorted_rows:
        x = torch.randn(
            _TRIAL_TOKENS * shape.num_experts,
            shape.hidden,
            generator=generator,
            dtype=torch.float32,
        )
        return (x.to(example.device, example.dtype),)

    top_k = min(2, shape.num_experts)
    x = torch.randn(_TRIAL_TOKENS, shape.hidden, generator=generator, dtype=torch.float32)
    order = torch.rand(
        _TRIAL_TOKENS,
        shape.num_experts + shape.identities,
        generator=generator,
        dtype=torch.float32,
    ).argsort(-1)
    weights = torch.rand(_TRIAL_TOKENS, top_k, generator=generator, dtype=torch.float32)
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
    rules: ExpertRules,
    weights: list[list[Tensor | None]],
    biases: list[list[Tensor | None]] | None,
) -> nn.Module:
    """The module of transformers with dense weights again.

    weights: for every expert [gate or None, up, down], each [out, in]; biases likewise, each [out].
    """
    shape = rules.shape
    original = rules.original
    if shape.stacks:
        return _restored_stacks(original, shape, weights)

    first = "gate_up_proj" if shape.has_gate else "up_proj"
    for ending, triples in (("", weights), ("_bias", biases)):
        if triples is None:
            continue

        joined = []
        downs = []
        for gate, up, down in triples:
            assert up is not None and down is not None
            if gate is not None:
                up = shape.join(gate, up, 0)
            joined.append(up)
            downs.append(down)

        for name, tensors in ((first, joined), ("down_proj", downs)):
            stacked = torch.stack(tensors)
            if name == first and rules._unread is not None and not ending:
                stacked = torch.cat([stacked, rules._unread.to(stacked)])
            if shape.transposed and not ending:
                stacked = stacked.transpose(1, 2).contiguous()

            original.register_parameter(name + ending, nn.Parameter(stacked, requires_grad=False))

    return original


def _restored_stacks(
    original: nn.Module,
    shape: ExpertShape,
    weights: list[list[Tensor | None]],
) -> nn.Module:
    """As `restore_original`, of experts in three stacks."""
    for place, name in enumerate(shape.stacks):
        parts = [cast(Tensor, triple[place]) for triple in weights]
        if place == len(shape.stacks) - 1:
            parts = [part.t() for part in parts]
        holder, leaf = holder_of(original, name)
        stack = nn.Parameter(torch.cat(parts).contiguous(), requires_grad=False)
        holder.register_parameter(leaf, stack)
    return original
