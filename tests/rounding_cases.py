"""Run in Triton's interpreter by test_refinement.py: prints the share of codes in which kernels and
plain operators differ."""

import json

import torch

from awq.backends import use_backend
from awq.core import refinement, rounding
from awq.core.ranges import search_range


def case(out: int, width: int, group_size: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(out)
    weight = torch.randn(out, width, generator=generator)
    x = torch.randn(512, width, generator=generator) @ torch.randn(
        width, width, generator=generator
    )
    gram = x.t() @ x
    with use_backend("reference"):
        scale, zero = search_range(weight, gram, group_size)
    solver = rounding.feedback_factor(gram)
    with use_backend("reference"):
        plain = rounding.round_with_feedback(weight, *solver, scale, zero)
        refined = refinement.descend(weight, gram, plain, 2)
    with use_backend("triton"):
        rounded = rounding.round_with_feedback(weight, *solver, scale, zero)
        descended = refinement.descend(weight, gram, plain, 2)
    differs = {
        "feedback": (rounded.codes != plain.codes).float().mean(),
        "descent": (descended.codes != refined.codes).float().mean(),
        "descent did something": (refined.codes != plain.codes).float().mean(),
    }
    return {name: float(value) for name, value in differs.items()}


print(json.dumps([case(40, 128, 32), case(33, 192, 64), case(7, 96, 96)]))
