"""Run in Triton's interpreter by test_refinement.py: prints the share of codes in which kernels and plain operators differ."""

import contextlib
import json

import torch

from awq.core import refinement, rounding, rounding_kernels
from awq.core.blocks import block_step
from awq.core.ranges import search_range

torch.cuda.device = lambda device: contextlib.nullcontext()  # the interpreter works on CPU tensors


def case(out: int, width: int, group_size: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(out)
    weight = torch.randn(out, width, generator=generator)
    x = torch.randn(512, width, generator=generator) @ torch.randn(width, width, generator=generator)
    gram = x.t() @ x
    scale, zero = search_range(weight, gram, group_size)
    solver = rounding.feedback_factor(gram)
    plain = rounding.round_with_feedback(weight, *solver, scale, zero)
    refined = refinement.descend(weight, gram, plain, 2)
    rounding.block_step = refinement.block_step = lambda name, plain, device: getattr(rounding_kernels, name)
    differs = {
        "feedback": (rounding.round_with_feedback(weight, *solver, scale, zero).codes != plain.codes).float().mean(),
        "descent": (refinement.descend(weight, gram, plain, 2).codes != refined.codes).float().mean(),
        "descent did something": (refined.codes != plain.codes).float().mean(),
    }
    rounding.block_step = refinement.block_step = block_step
    return {name: float(value) for name, value in differs.items()}


print(json.dumps([case(40, 128, 32), case(33, 192, 64), case(7, 96, 96)]))
