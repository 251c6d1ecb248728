"""AutoAWQ's algorithm, written anew from its paper (arXiv 2306.00978) and its behaviour, to compare
quantizers on equal texts.

For Llama-like blocks. What it does, per block and with inputs of the original predecessors:

- scales: for each group of linears that share an input, 20 ratios r in [0, 1); s = mean|x|^r /
  mean|w|^(1 − r), with each weight divided by its group's largest one before the mean; s is divided
  by √(max · min). The ratio with the least squared error of the enclosing module's output wins.
- clipping: for every linear but query and key, each group's range shrinks symmetrically in steps of
  a twentieth down to a half; the least squared error of the group's own share of the output, on 512
  sampled tokens, wins.
- rounding: to nearest, asymmetric, min/max of the clipped weight.

The linears get the quantized values; nothing is packed, so its figures are those of equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

RATIOS = 20
CLIP_STEPS = 10  # of a twentieth each
CLIP_TOKENS = 512
SEARCH_TOKENS = 16_384  # of the module outputs that judge scales


@torch.no_grad()
def quantize_like_autoawq(model: Any, batches: Sequence[Any], group_size: int) -> None:
    """Quantized values in every linear of the model's blocks, in place. batches: of
    `load_calibration`, without padding."""
    device = next(model.parameters()).device
    blocks = model.model.layers
    calls = [_first_input(model, blocks[0], batch.input_ids.to(device)) for batch in batches]
    hidden = [call[0] for call in calls]
    for block in blocks:
        inputs = _inputs(block, hidden, calls)
        after = [_run(block, h, call) for h, call in zip(hidden, calls)]
        for names, module, before in _groups(block):
            _scale(block, names, module, before, inputs, hidden, calls, group_size)
        for name, linear in _linears(block):
            if "q_proj" not in name and "k_proj" not in name:
                _clip(linear, inputs[name], group_size)
        for _, linear in _linears(block):
            linear.weight.copy_(nearest(linear.weight, group_size))
        hidden = after  # the original's outputs: AutoAWQ's blocks never see quantized predecessors


def nearest(weight: Tensor, group_size: int) -> Tensor:
    """The 4-bit values nearest to a weight [out, in], asymmetric, min/max of each group."""
    grouped = weight.view(len(weight), -1, group_size)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-5)
    zero = (-low / scale).round().clamp(0, 15)
    codes = ((grouped / scale).round() + zero).clamp(0, 15)
    return ((codes - zero) * scale).view_as(weight)


class _Stop(Exception):
    pass


def _first_input(model: Any, block: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    found: list[tuple[Tensor, dict[str, Any]]] = []

    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(
            (
                args[0],
                {k: v for k, v in kwargs.items() if k not in ("past_key_values", "past_key_value")},
            )
        )
        raise _Stop

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(input_ids=ids, use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return found[0]


def _run(block: nn.Module, hidden: Tensor, call: tuple[Tensor, dict[str, Any]]) -> Tensor:
    output = block(hidden, **call[1])
    return output[0] if isinstance(output, tuple) else output


def _linears(block: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [
        (name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)
    ]


def _inputs(block: nn.Module, hidden: list[Tensor], calls: list) -> dict[str, Tensor]:
    """Every linear's inputs [tokens, in]."""
    found: dict[str, list[Tensor]] = {name: [] for name, _ in _linears(block)}
    handles = []
    for name, linear in _linears(block):
        keep = found[name].append
        handles.append(
            linear.register_forward_pre_hook(
                lambda _m, args, keep=keep: keep(args[0].flatten(0, 1))
            )
        )
    for h, call in zip(hidden, calls):
        _run(block, h, call)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def _groups(block: Any) -> list[tuple[list[str], str, Callable[[Tensor], None]]]:
    """(linears that share an input, module whose output judges them, what takes 1/s) in AutoAWQ's
    order."""
    attention, mlp = block.self_attn, block.mlp

    def into(parameter: Tensor) -> Callable[[Tensor], None]:
        def divide(scale: Tensor) -> None:
            parameter.div_(scale if parameter.dim() == 1 else scale.unsqueeze(1))

        return divide

    groups = [
        (
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "self_attn",
            into(block.input_layernorm.weight),
        ),
        (["mlp.gate_proj", "mlp.up_proj"], "mlp", into(block.post_attention_layernorm.weight)),
        (["mlp.down_proj"], "mlp.down_proj", into(mlp.up_proj.weight)),
    ]
    # AutoAWQ leaves grouped-query attention out
    if attention.v_proj.weight.shape == attention.o_proj.weight.shape:
        groups.insert(1, (["self_attn.o_proj"], "self_attn.o_proj", into(attention.v_proj.weight)))
    return groups


def _scale(
    block: Any,
    names: list[str],
    module: str,
    fold: Callable[[Tensor], None],
    inputs: dict[str, Tensor],
    hidden: list[Tensor],
    calls: list,
    group_size: int,
) -> None:
    linears = [block.get_submodule(name) for name in names]
    x = inputs[names[0]]
    weight = torch.cat([linear.weight for linear in linears])
    relative = weight.abs().view(len(weight), -1, group_size)
    relative = (relative / (relative.amax(-1, keepdim=True) + 1e-6)).view_as(weight)
    w_mean, x_mean = relative.mean(0), x.abs().mean(0)
    judge = _judge(block, module, x, hidden, calls)
    wanted = judge()
    originals = [linear.weight.clone() for linear in linears]
    best_loss, best = float("inf"), torch.ones_like(x_mean)
    for step in range(RATIOS):
        ratio = step / RATIOS
        scale = (x_mean**ratio / (w_mean ** (1 - ratio) + 1e-4)).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        scale[~scale.isfinite()] = 1
        for linear, original in zip(linears, originals):
            linear.weight.copy_(nearest(original * scale, group_size) / scale)
        loss = float((judge() - wanted).pow(2).mean())
        if loss < best_loss:
            best_loss, best = loss, scale
    for linear, original in zip(linears, originals):
        linear.weight.copy_(original * best)
    fold(best)
    for name in names:
        inputs[name] = inputs[name] / best


def _judge(
    block: Any, module: str, x: Tensor, hidden: list[Tensor], calls: list
) -> Callable[[], Tensor]:
    """What the module gives for its inputs, on at most SEARCH_TOKENS tokens."""
    target = block.get_submodule(module)
    if module != "self_attn":
        part = x[:SEARCH_TOKENS]
        return lambda: target(part)
    shape = hidden[0].shape
    count = max(1, SEARCH_TOKENS // (shape[0] * shape[1]))
    sizes = [h.shape[0] * h.shape[1] for h in hidden]
    parts = [p.view(*h.shape[:2], -1) for p, h in zip(x.split(sizes), hidden)][:count]

    def attend() -> Tensor:
        return torch.cat([target(p, **call[1])[0].flatten(0, 1) for p, call in zip(parts, calls)])

    return attend


def _clip(linear: nn.Linear, x: Tensor, group_size: int) -> None:
    weight = linear.weight
    sample = x[:: max(1, len(x) // CLIP_TOKENS)][:CLIP_TOKENS]
    sample = sample.view(len(sample), -1, group_size)
    grouped = weight.view(len(weight), -1, group_size)
    for start in range(0, len(weight), 256):
        part = grouped[start : start + 256]
        limit = part.abs().amax(-1, keepdim=True)
        wanted = torch.einsum("tgi,ogi->tog", sample, part)
        best, best_error = limit, torch.full_like(limit[..., 0], float("inf"))
        for step in range(CLIP_STEPS):
            bound = limit * (1 - step / 20)
            clipped = torch.minimum(torch.maximum(part, -bound), bound)
            values = nearest(clipped.flatten(1), group_size).view_as(part)
            error = (torch.einsum("tgi,ogi->tog", sample, values) - wanted).pow(2).mean(0)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = torch.where(better.unsqueeze(-1), bound, best)
        part.copy_(torch.minimum(torch.maximum(part, -best), best))
