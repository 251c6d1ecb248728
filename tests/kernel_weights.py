"""Random weights for the tests of kernels, packed, and how far a product is from float64."""

import torch

from awq.core.weight import QuantizedWeight
from awq.formats import get_layout
from awq.kernels import Packed, Shape

# of a product, relative to float64; bfloat16 has 8 bits of mantissa
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}


def random_weight(in_features, out_features, group, seed=0, device="cpu"):
    """Random codes, scales and zero points, unlike those of any rounded weight."""
    generator = torch.Generator(device).manual_seed(seed)
    groups = (out_features, in_features // group)

    def codes(size):
        return torch.randint(0, 16, size, generator=generator, dtype=torch.uint8, device=device)

    values = codes((out_features, in_features))
    scales = torch.rand(groups, generator=generator, device=device) * 0.02 + 1e-3
    return QuantizedWeight(values, scales.half(), codes(groups))


def pack(weight, layout="planar"):
    """The weight in a layout that kernels read."""
    tensors = get_layout(layout).pack(weight)
    out_features, in_features = weight.codes.shape
    shape = Shape(in_features, out_features, weight.group_size)
    return Packed(tensors["qweight"], tensors["qzeros"], tensors["scales"], shape, layout)


def product_error(y, x, dense, bias=None):
    """‖y − r‖ / ‖r‖ with r = x · denseᵀ + bias in float64. dense: float64 [out, in]."""
    expected = x.double() @ dense.t()
    if bias is not None:
        expected = expected + bias.double()
    return float((y.double() - expected).norm() / expected.norm())
