"""Runs the Triton kernels in Triton's interpreter (TRITON_INTERPRET=1, set by the caller) and
prints relative errors as JSON.

A script, because Triton decides at the import of a kernel whether it is interpreted. The error is
‖y − r‖ / ‖r‖ with r from float64 arithmetic on the same packed weight and activations. Products are
float16: the interpreter multiplies the bits of bfloat16 operands as integers.
"""

import json
import sys

import torch

from awq.core.weight import QuantizedWeight
from awq.formats import get_layout
from awq.kernels import Packed, Shape, moe, stack_experts
from awq.kernels.reference.decode import ACTIVATIONS
from awq.kernels.triton import decode_launch, expert_launch, launcher, matmul_launch
from awq.kernels.triton.configs import GATE_INTERLEAVE, Config

# in, out, group, tokens, dtype, bias, zero point, configuration (bm, bn, split, scale_weight,
# warps, stages)
CASES = {
    "one token": (256, 64, 128, 1, "float16", False, True, (16, 32, 1, False, 1, 1)),
    "split in two": (512, 64, 128, 3, "float16", True, True, (16, 32, 2, False, 1, 1)),
    "split unevenly": (640, 72, 128, 5, "float16", True, True, (16, 64, 4, False, 1, 1)),
    "more programs than blocks": (
        256,
        64,
        128,
        2,
        "float16",
        False,
        True,
        (16, 64, 4, False, 1, 1),
    ),
    "group 64": (320, 40, 64, 17, "float16", False, False, (16, 32, 2, False, 1, 1)),
    "group 32, tail of inputs": (288, 8, 32, 4, "float16", False, True, (16, 32, 2, False, 1, 1)),
    "group 96": (192, 24, 96, 4, "float16", True, True, (16, 32, 1, False, 1, 1)),
    "group 256": (512, 64, 256, 4, "float16", False, True, (16, 64, 2, False, 1, 1)),
    "whole row, tail": (136, 16, 136, 9, "float16", True, True, (16, 32, 2, False, 1, 1)),
    "whole row, no zero point": (
        576,
        192,
        576,
        20,
        "float16",
        False,
        False,
        (32, 64, 2, False, 1, 1),
    ),
    "scaled weights": (384, 136, 128, 33, "float16", True, True, (64, 128, 1, True, 1, 1)),
    "scaled weights, group 32, split": (
        384,
        64,
        32,
        70,
        "float16",
        False,
        True,
        (64, 64, 2, True, 1, 1),
    ),
    "outputs beyond the padding": (
        128,
        200,
        128,
        2,
        "float16",
        False,
        True,
        (16, 128, 1, False, 1, 1),
    ),
    "dense": (288, 72, 96, 3, "float32", True, True, None),
    "dense, in pieces": (128, 200, 128, 3, "bfloat16", True, True, None),
}


def error(in_features, out_features, group, tokens, dtype, bias, zero_point, config):
    generator = torch.Generator().manual_seed(in_features + tokens)
    groups = in_features // group
    codes = torch.randint(
        0, 16, (out_features, in_features), generator=generator, dtype=torch.uint8
    )
    scales = (torch.rand(out_features, groups, generator=generator) * 0.02 + 1e-3).half()
    zeros = torch.randint(0, 16, (out_features, groups), generator=generator, dtype=torch.uint8)
    weight = QuantizedWeight(codes, scales, zeros if zero_point else torch.full_like(zeros, 8))
    t, shape = get_layout("planar").pack(weight), Shape(in_features, out_features, group)
    packed = Packed(t["qweight"], t["qzeros"], t["scales"], shape, "planar")
    x = torch.randn(tokens, in_features, generator=generator).to(getattr(torch, dtype))
    offset = torch.randn(out_features, generator=generator).to(x.dtype) if bias else None
    expected = x.double() @ weight.dequantize(torch.float64).t() + (
        0 if offset is None else offset.double()
    )
    run = (
        matmul_launch.through_dense
        if config is None
        else lambda *args: matmul_launch.fused(*args, Config(*config))
    )
    first = run(x, packed, offset)
    assert first.dtype == x.dtype
    if config is not None and Config(*config).split > 1:  # counters are left as they were found
        assert torch.equal(first, run(x, packed, offset))
    return ((first.double() - expected).norm() / expected.norm()).item()


def random_weight(out_features, in_features, group, generator):
    size, groups = (out_features, in_features), (out_features, in_features // group)
    codes = torch.randint(0, 16, size, generator=generator, dtype=torch.uint8)
    scales = (torch.rand(groups, generator=generator) * 0.02 + 1e-3).half()
    zeros = torch.randint(0, 16, groups, generator=generator, dtype=torch.uint8)
    return QuantizedWeight(codes, scales, zeros)


# in, gate + up, group, tokens, bias, activation, configuration
GATED_CASES = {
    "gated, one token": (256, 64, 128, 1, False, "silu", (16, 32, 1, False, 1, 1)),
    "gated, split, several runs in a tile": (
        512,
        192,
        128,
        3,
        True,
        "gelu_tanh",
        (16, 128, 3, False, 1, 1),
    ),
    "gated, tiles beyond the outputs": (256, 96, 64, 40, True, "gelu", (32, 64, 1, True, 1, 1)),
    "gated, dense": (256, 96, 64, 40, True, "relu", None),
}


def gated_error(in_features, out_features, group, tokens, bias, name, config):
    """Relative error of activation(gate) · up to the same of the rounded product without it; 0 when
    it is rounded alike."""
    generator = torch.Generator().manual_seed(in_features + tokens)
    codes, zeros = (
        torch.randint(0, 16, (out_features, n), generator=generator, dtype=torch.uint8)
        for n in (in_features, in_features // group)
    )
    scales = (torch.rand(zeros.shape, generator=generator) * 0.02 + 1e-3).half()
    t, shape = (
        get_layout("planar").pack(QuantizedWeight(codes, scales, zeros)),
        Shape(in_features, out_features, group),
    )
    packed = Packed(t["qweight"], t["qzeros"], t["scales"], shape, "planar")
    x = torch.randn(tokens, in_features, generator=generator).half()
    offset = torch.randn(out_features, generator=generator).half() if bias else None
    if config is None:
        plain, found = (
            matmul_launch.through_dense(x, packed, offset),
            decode_launch.activate(
                matmul_launch.through_dense(x, packed, offset), name, True, GATE_INTERLEAVE
            ),
        )
    else:
        plain = matmul_launch.fused(x, packed, offset, Config(*config))
        found = matmul_launch.fused(x, packed, offset, Config(*config), name)
    gate, up = (
        half.reshape(tokens, -1).float()
        for half in plain.view(tokens, -1, 2, GATE_INTERLEAVE).unbind(2)
    )
    expected = ACTIVATIONS[name](gate).half().float() * up
    return ((found.float() - expected).norm() / expected.norm()).item()


# experts, in, out, group, tokens, top_k, rows of x shared by a token's experts, weights, bias,
# sorted, configuration
EXPERT_CASES = {
    "experts, one token": (
        8,
        256,
        64,
        128,
        1,
        2,
        True,
        False,
        False,
        False,
        (16, 32, 1, False, 1, 1),
    ),
    "experts, more rows than a block": (
        3,
        256,
        72,
        128,
        40,
        2,
        True,
        True,
        True,
        False,
        (16, 64, 2, False, 1, 1),
    ),
    "experts, own rows": (
        5,
        288,
        40,
        32,
        7,
        3,
        False,
        True,
        False,
        False,
        (16, 32, 2, False, 1, 1),
    ),
    "experts, whole row": (
        4,
        136,
        24,
        136,
        5,
        1,
        True,
        False,
        True,
        False,
        (16, 32, 1, False, 1, 1),
    ),
    "experts, sorted": (6, 256, 72, 64, 61, 3, True, True, True, True, (32, 64, 2, True, 1, 1)),
    "experts, sorted, most idle": (
        129,
        128,
        200,
        128,
        4,
        2,
        False,
        False,
        False,
        True,
        (16, 128, 1, False, 1, 1),
    ),
    "experts, sorted, one of them": (
        1,
        288,
        16,
        96,
        33,
        1,
        True,
        False,
        False,
        True,
        (16, 32, 1, False, 1, 1),
    ),
}


def expert_error(
    count, in_features, out_features, group, tokens, top, shared, weighted, bias, by_sorting, config
):
    """Relative error to float64 of expert after expert through the reference; equal bits in two
    runs."""
    generator = torch.Generator().manual_seed(in_features + tokens)
    stack = []
    for _ in range(count):
        t = get_layout("planar").pack(random_weight(out_features, in_features, group, generator))
        stack.append(
            Packed(
                t["qweight"],
                t["qzeros"],
                t["scales"],
                Shape(in_features, out_features, group),
                "planar",
            )
        )
    packed = stack_experts(stack)
    x = torch.randn(
        *((tokens,) if shared else (tokens, top)), in_features, generator=generator
    ).half()
    experts = torch.stack([torch.randperm(count, generator=generator)[:top] for _ in range(tokens)])
    weights = torch.rand(tokens, top, generator=generator).half() if weighted else None
    offset = torch.randn(count, out_features, generator=generator).half() if bias else None

    def run(chosen):
        few = not by_sorting
        return expert_launch.fused(x, packed, offset, chosen, weights, Config(*config), few)

    first, second = run(experts), run(experts)
    _check_unknown_experts(run, experts, count, first)
    assert torch.equal(first, second) and not launcher.counters(x.device).take(1).any()
    expected = moe.one_by_one(
        x.double(),
        packed,
        None if offset is None else offset.double(),
        experts,
        None,
        lambda rows, weight, b: (
            rows @ weight.unpack().dequantize(torch.float64).t() + (0 if b is None else b)
        ),
    )
    if weights is not None:
        expected = expected * weights.double().unsqueeze(-1)
    return ((first.double() - expected).norm() / expected.norm()).item()


def _check_unknown_experts(run, experts, count, known):
    """Rows of experts that there are not give NaN, and every other row its own bits."""
    for number in (-1, count, 1 << 20, -(1 << 40), (1 << 32) + 1):
        chosen = experts.clone()
        chosen[-1, -1] = chosen[0, 0] = number
        lost = (chosen != experts).unsqueeze(-1).expand_as(known)
        found = run(chosen)
        assert found[lost].isnan().all() and torch.equal(found[~lost], known[~lost]), number


# experts, hidden, inner, group, tokens, top_k, bias, activation, alternating, configuration
# of both products
MIXTURE_CASES = {
    "mixture, one token": (6, 256, 96, 32, 1, 3, False, "silu", False, (16, 64, 1, False, 1, 1)),
    "mixture, split, tiles beyond": (
        5,
        256,
        96,
        32,
        1,
        2,
        True,
        "gelu_tanh",
        False,
        (16, 128, 2, False, 1, 1),
    ),
    "mixture, several tokens, alternating": (
        4,
        128,
        64,
        64,
        7,
        2,
        True,
        "silu",
        True,
        (16, 32, 1, False, 1, 1),
    ),
    "mixture, sorted": (4, 128, 64, 32, 70, 2, False, "relu", False, (32, 64, 1, True, 1, 1)),
}


def mixture_error(count, hidden, inner, group, tokens, top, bias, name, alternating, config):
    """Relative error of gate, up, activation, down and weighted sum to the same in float64; equal
    bits in two runs."""
    generator = torch.Generator().manual_seed(hidden + tokens)

    def stack(outputs, inputs):
        packed, dense = [], []
        for _ in range(count):
            weight = random_weight(outputs, inputs, group, generator)
            t = get_layout("planar").pack(weight)
            shape = Shape(inputs, outputs, group)
            packed.append(Packed(t["qweight"], t["qzeros"], t["scales"], shape, "planar"))
            dense.append(weight.dequantize(torch.float64))
        return stack_experts(packed), torch.stack(dense)

    (first, up_down), (second, down) = stack(2 * inner, hidden), stack(hidden, inner)
    biases = [
        torch.randn(count, n, generator=generator).half() if bias else None
        for n in (2 * inner, hidden)
    ]
    x = torch.randn(tokens, hidden, generator=generator).half()
    order = torch.rand(tokens, count, generator=generator).argsort(-1)
    experts = order[:, :top].int().contiguous()
    weights = torch.rand(tokens, top, generator=generator)
    expert_launch._config = lambda *_: Config(*config)
    runs = [
        expert_launch.expert_parts(x, first, second, biases, experts, weights, name, alternating)
        for _ in range(2)
    ]
    assert torch.equal(*runs) and not launcher.counters(x.device).take(1).any()
    expected = torch.zeros(tokens, hidden, dtype=torch.float64)
    for slot in range(top):
        chosen = experts[:, slot].long()
        h = torch.einsum("ti,toi->to", x.double(), up_down[chosen])
        h = h if biases[0] is None else h + biases[0][chosen].double()
        gate, up = (h[:, ::2], h[:, 1::2]) if alternating else h.chunk(2, -1)
        y = torch.einsum("ti,toi->to", ACTIVATIONS[name](gate) * up, down[chosen])
        y = y if biases[1] is None else y + biases[1][chosen].double()
        expected += y * weights[:, slot : slot + 1].double()
    return ((runs[0].double().sum(1) - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    matmul_launch.MAX_DENSE_BYTES = 64 * 128 * 2  # so that small weights go in pieces
    errors = {name: error(*case) for name, case in CASES.items()}
    errors |= {name: expert_error(*case) for name, case in EXPERT_CASES.items()}
    errors |= {name: gated_error(*case) for name, case in GATED_CASES.items()}
    errors |= {name: mixture_error(*case) for name, case in MIXTURE_CASES.items()}
    json.dump(errors, sys.stdout)
