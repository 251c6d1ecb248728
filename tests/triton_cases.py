"""Runs the Triton kernels in Triton's interpreter (TRITON_INTERPRET=1, set by the caller) and prints relative errors as JSON.

A script, because Triton decides at the import of a kernel whether it is interpreted. The error is ‖y − r‖ / ‖r‖ with r from
float64 arithmetic on the same packed weight and activations. Products are float16: the interpreter multiplies the bits of
bfloat16 operands as integers.
"""

import json
import sys

import torch

from awq.core.weight import QuantizedWeight
from awq.formats import get_layout
from awq.kernels import Packed, Shape
from awq.kernels.triton import launch
from awq.kernels.triton.configs import Config

# in, out, group, tokens, dtype, bias, zero point, configuration (bm, bn, split, scale_weight, warps, stages)
CASES = {
    "one token": (256, 64, 128, 1, "float16", False, True, (16, 32, 1, False, 1, 1)),
    "split in two": (512, 64, 128, 3, "float16", True, True, (16, 32, 2, False, 1, 1)),
    "split unevenly": (640, 72, 128, 5, "float16", True, True, (16, 64, 4, False, 1, 1)),
    "more programs than blocks": (256, 64, 128, 2, "float16", False, True, (16, 64, 4, False, 1, 1)),
    "group 64": (320, 40, 64, 17, "float16", False, False, (16, 32, 2, False, 1, 1)),
    "group 32, tail of inputs": (288, 8, 32, 4, "float16", False, True, (16, 32, 2, False, 1, 1)),
    "group 96": (192, 24, 96, 4, "float16", True, True, (16, 32, 1, False, 1, 1)),
    "group 256": (512, 64, 256, 4, "float16", False, True, (16, 64, 2, False, 1, 1)),
    "whole row, tail": (136, 16, 136, 9, "float16", True, True, (16, 32, 2, False, 1, 1)),
    "whole row, no zero point": (576, 192, 576, 20, "float16", False, False, (32, 64, 2, False, 1, 1)),
    "scaled weights": (384, 136, 128, 33, "float16", True, True, (64, 128, 1, True, 1, 1)),
    "scaled weights, group 32, split": (384, 64, 32, 70, "float16", False, True, (64, 64, 2, True, 1, 1)),
    "outputs beyond the padding": (128, 200, 128, 2, "float16", False, True, (16, 128, 1, False, 1, 1)),
    "dense": (288, 72, 96, 3, "float32", True, True, None),
    "dense, in pieces": (128, 200, 128, 3, "bfloat16", True, True, None),
}


def error(in_features, out_features, group, tokens, dtype, bias, zero_point, config):
    generator = torch.Generator().manual_seed(in_features + tokens)
    groups = in_features // group
    codes = torch.randint(0, 16, (out_features, in_features), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(out_features, groups, generator=generator) * 0.02 + 1e-3).half()
    zeros = torch.randint(0, 16, (out_features, groups), generator=generator, dtype=torch.uint8)
    weight = QuantizedWeight(codes, scales, zeros if zero_point else torch.full_like(zeros, 8))
    t, shape = get_layout("planar").pack(weight), Shape(in_features, out_features, group)
    packed = Packed(t["qweight"], t["qzeros"], t["scales"], shape, "planar")
    x = torch.randn(tokens, in_features, generator=generator).to(getattr(torch, dtype))
    offset = torch.randn(out_features, generator=generator).to(x.dtype) if bias else None
    expected = x.double() @ weight.dequantize(torch.float64).t() + (0 if offset is None else offset.double())
    run = launch.through_dense if config is None else lambda *args: launch.fused(*args, Config(*config))
    first, second = (run(x, packed, offset) for _ in range(2))
    assert first.dtype == x.dtype and torch.equal(first, second)
    return ((first.double() - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    launch._CHUNK = 64 * 128 * 2  # so that small weights go in pieces
    json.dump({name: error(*case) for name, case in CASES.items()}, sys.stdout)
