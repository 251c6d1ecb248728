"""Compares the kernels of the searches with plain operators and prints what differs, as JSON.

Without arguments in Triton's interpreter (TRITON_INTERPRET=1, set by test_search.py); `python
tests/search_cases.py cuda` on a GPU, on larger weights too. A script, because Triton decides at the
import of a kernel whether it is interpreted.
"""

import json
import sys
from typing import Any

import torch

from awq.backends import use_backend
from awq.core import scales
from awq.core.ranges import block_diagonal, search_range
from awq.core.scales import search_scale
from awq.core.weight import fake_quantize

# out, in, group size, bits, zero point
SMALL = [
    (40, 64, 32, 4, True),
    (70, 64, 64, 4, True),
    (7, 96, 96, 4, True),
    (5, 48, 16, 3, False),
    (3, 256, 128, 8, True),
]
LARGE = [
    (6144, 4096, 128, 4, True),
    (960, 576, 64, 4, True),
    (4096, 14336, 128, 4, True),
    (576, 1536, 32, 4, False),
]


def problem(out: int, width: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, a Gram matrix and mean activations; one channel dead, one group of zeros, one row
    of a single sign."""
    generator = torch.Generator(device).manual_seed(out)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    weight, mix = (
        random(out, width),
        torch.eye(width, device=device) + random(width, width) / width**0.5,
    )
    weight[0, :16], weight[-1] = 0, weight[-1].abs()
    x = random(600, width) * random(width).exp() @ mix
    x[:, 3] = 0
    return weight, x.t() @ x, x.abs().mean(0)


def with_kernels(call: Any) -> Any:
    with use_backend("triton"):
        return call()


def without_kernels(call: Any) -> Any:
    with use_backend("reference"):
        return call()


def runs_on(device: str) -> int:
    """The interpreter runs programs one after the other: a second run tells nothing there."""
    return 2 if device == "cuda" else 1


def range_case(
    out: int, width: int, size: int, bits: int, zero_point: bool, device: str
) -> dict[str, float]:
    weight, gram, _ = problem(out, width, device)
    blocks = block_diagonal(gram, size)

    def loss(found: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        delta = (fake_quantize(weight, *found, bits) - weight).view(out, -1, size)
        return (torch.einsum("ogi,gij->ogj", delta, blocks) * delta).sum(-1)

    plain = without_kernels(lambda: search_range(weight, gram, size, bits, zero_point))
    ours, *again = (
        with_kernels(lambda: search_range(weight, gram, size, bits, zero_point))
        for _ in range(runs_on(device))
    )
    assert all(torch.equal(a, b) for more in again for a, b in zip(ours, more)), "two runs differ"
    differs = (plain[0] != ours[0]) | (plain[1] != ours[1])
    worse = loss(ours) / loss(plain).clamp(min=1e-20) - 1
    return {
        "differs": float(differs.float().mean()),
        "worse": float(worse[differs].abs().max()) if differs.any() else 0.0,
    }


def scale_case(
    out: int, width: int, size: int, bits: int, zero_point: bool, device: str
) -> dict[str, float]:
    weight, gram, mean = problem(out, width, device)
    candidates = scales.scale_candidates(mean, scales.weight_importance(weight, size))[1][::8]

    def losses() -> torch.Tensor:
        return scales._losses(weight, gram, candidates, size, bits, zero_point)

    expected = without_kernels(losses)
    found, *again = (with_kernels(losses) for _ in range(runs_on(device)))
    assert all(torch.equal(found, more) for more in again), "two runs differ"
    chosen = [
        choose(lambda: search_scale(weight, gram, mean, size, bits, zero_point))
        for choose in (with_kernels, without_kernels)
    ]
    return {
        "error": float((found / expected - 1).abs().max()),
        "same choice": float(torch.equal(*(c.scale for c in chosen))),
    }


if __name__ == "__main__":
    place = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    if place == "cpu":
        import interpreter  # noqa: F401

        # the interpreter multiplies bfloat16 as if it were integers
        scales._OPERANDS = torch.float32
    found = {}
    for case in SMALL + (LARGE if place == "cuda" else []):
        found[str(case)] = range_case(*case, place) | scale_case(*case, place)
    # too large for the kernel of ranges
    for case in [(5, 240, 240, 4, True), (2, 400, 400, 4, True)]:
        found[str(case)] = scale_case(*case, place)
    print(json.dumps(found, indent=1))
