"""How far a quantized model can be split by tensor parallelism: known from its shapes before any
work.

An engine that spreads a model over T GPUs splits the inputs of every linear that writes into the
residual stream (attention's output, `down_proj`, the experts' `down_proj`) into T equal parts. A
group of weights shares one scale and lies along the inputs, so each part has to hold whole groups:
inputs / T must be a multiple of the group size. Linears that read the residual stream are split by
their outputs, where groups do not matter. Experts are narrow, and so it is they that set the limit:
those of Qwen3-30B-A3B have 768 inner features, which at group size 128 end at T = 2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from awq.nn.expert_shape import fused_experts
from awq.nn.surgery import is_linear, linear_shape

SIZES = (1, 2, 4, 8, 16)  # engines take powers of two
GROUP_SIZES = (128, 64, 32)
ENOUGH = 4  # GPUs; a plan that ends below is worth a word


@dataclass(frozen=True)
class TensorParallel:
    """size: the largest number of GPUs; limit: name of the linear that allows no more, None where
    nothing limits it.

    finer: group size → the number it would allow, for smaller group sizes that allow more.
    """

    size: int
    limit: str | None
    finer: dict[int, int]

    def __str__(self) -> str:
        if self.limit is None:
            return f"tensor parallelism up to {self.size} GPUs"
        text = f"tensor parallelism up to {self.size} GPU{'s' * (self.size > 1)}, by {self.limit}"
        more = ", ".join(f"group size {group} up to {size}" for group, size in self.finer.items())
        return f"{text}; {more}" if more and self.size < ENOUGH else text


def tensor_parallel(split_inputs: Mapping[str, int], group_size: int) -> TensorParallel:
    """The largest number of GPUs for linears whose inputs are split.

    split_inputs: name → in_features. group_size: −1 means one group a row, which cannot be split.

    >>> tensor_parallel({"experts.0.down_proj": 768, "o_proj": 4096}, 128).size
    2
    """
    size, limit = _largest(split_inputs, group_size)
    finer: dict[int, int] = {}
    for group in GROUP_SIZES:
        allowed = _largest(split_inputs, group)[0]
        is_finer = group_size == -1 or group < group_size
        if is_finer and allowed > max([size, *finer.values()]):
            finer[group] = allowed

    return TensorParallel(size, limit, finer)


def _largest(split_inputs: Mapping[str, int], group_size: int) -> tuple[int, str | None]:
    """(number of GPUs, the linear that allows no more or None)."""
    largest = SIZES[-1]
    limit = None
    for name, inputs in split_inputs.items():
        group = inputs if group_size == -1 else group_size
        fitting = [size for size in SIZES if inputs % (size * group) == 0]
        allowed = max(fitting, default=1)
        if allowed < largest:
            largest = allowed
            limit = name

    return largest, limit


def split_inputs(model: nn.Module, targets: Collection[str]) -> dict[str, int]:
    """Name → in_features of the linears among `targets` whose inputs engines split, and of all
    fused experts' `down_proj`.

    These are the linears that write as many features as the model's hidden states have. (A query
    projection of the same width counts too; the output projection beside it then has just as many
    inputs, so that nothing changes.)
    """
    config = getattr(model, "config", None)
    hidden = None if config is None else getattr(config.get_text_config(), "hidden_size", None)

    found = {}
    for name, module in model.named_modules():
        if name in targets and is_linear(module):
            inputs, outputs = linear_shape(module)
            if outputs == hidden:
                found[name] = inputs

    for name, shape in fused_experts(model).items():
        found[f"{name}.down_proj"] = shape.inner
    return found
