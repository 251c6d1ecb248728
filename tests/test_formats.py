"""Codecs: exactly invertible, in the layouts that other readers expect."""

import pytest
import torch

from awq.config import AwqConfig
from awq.core.weight import QuantizedWeight, round_to_nearest
from awq.errors import ConfigError
from awq.formats import get_format
from awq.utils.packing_utils import dequantize_gemm

SHAPES = [(64, 64, 64), (128, 8, 16), (192, 40, 32), (384, 16, 128), (256, 64, 256), (1536, 24, 128)]


def random_weight(in_features, out_features, group_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return round_to_nearest(torch.randn(out_features, in_features, generator=generator), group_size)


@pytest.mark.parametrize("name", ["gemm", "gemv", "gemv_fast"])
@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_inverts_pack(name, shape):
    weight, codec = random_weight(*shape), get_format(name)
    tensors = codec.pack(weight)
    for key, (size, dtype) in codec.shapes(*shape).items():
        assert tuple(tensors[key].shape) == size and tensors[key].dtype == dtype
    for a, b in zip(codec.unpack(tensors, *shape), weight):
        assert (a == b) if isinstance(a, int) else torch.equal(a, b)


def test_gemm_bits_are_where_the_format_says():
    weight = random_weight(32, 16, 16)
    tensors = get_format("gemm").pack(weight)
    for k in range(32):
        for column in range(2):
            word = int(tensors["qweight"][k, column]) & 0xFFFFFFFF
            for i, offset in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                assert (word >> (4 * i)) & 15 == int(weight.codes[8 * column + offset, k])


def test_gemv_bits_are_where_the_format_says():
    weight = random_weight(64, 8, 32)
    tensors = get_format("gemv").pack(weight)
    assert tensors["qzeros"].shape == (8, 4) and tensors["scales"].shape == (8, 32)
    for row in range(8):
        for word in range(8):
            value = int(tensors["qweight"][row, word]) & 0xFFFFFFFF
            assert [(value >> (4 * i)) & 15 for i in range(8)] == weight.codes[row, 8 * word : 8 * word + 8].tolist()
    assert not tensors["scales"][:, 2:].any()


def spelled_out_gemv_fast(codes):
    """The interleaving written as the format's description reads, one step at a time."""
    rows, width = codes.shape
    c = codes.reshape(rows, width // 32, 32).reshape(rows, width // 32, 4, 4, 2).permute(0, 1, 3, 2, 4)
    c = c.reshape(rows, width // 32, 4, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(rows, width)
    c = c.reshape(rows // 4, 4, width // 64, 64).permute(0, 2, 1, 3).reshape(rows // 4, width // 64, 64, 4).int()
    words = c[..., 0] | c[..., 1] << 4 | c[..., 2] << 8 | c[..., 3] << 12
    return words.reshape(rows // 4, width).to(torch.int32).apply_(lambda v: v - 65536 if v >= 32768 else v).to(torch.int16)


def test_gemv_fast_bits_are_where_the_format_says():
    weight = random_weight(128, 8, 64)
    tensors = get_format("gemv_fast").pack(weight)
    assert torch.equal(tensors["qweight"], spelled_out_gemv_fast(weight.codes))
    scaled = -(weight.scales.float() * weight.zeros.float()).half().t()
    assert torch.equal(tensors["qzeros"][:2], scaled)


def test_compat_dequantize_gemm_reads_ours():
    weight = random_weight(192, 40, 32)
    t = get_format("gemm").pack(weight)
    dense = dequantize_gemm(t["qweight"], t["qzeros"], t["scales"].float(), 4, 32)
    torch.testing.assert_close(dense.t(), weight.dequantize(), rtol=0, atol=0)


def test_codes_are_clamped():
    extreme = torch.tensor([[1e4, -1e4] + [0.0] * 14]).repeat(8, 1)
    assert int(round_to_nearest(extreme, 16).codes.max()) <= 15


@pytest.mark.parametrize("spelling", ["GEMM", "gemm", "GEMV", "GEMVFast", "gemv_fast", "GEMV_FAST"])
def test_spellings(spelling):
    assert get_format(spelling).name == AwqConfig.from_dict({"version": spelling}).format


def test_unknown_version_and_bits_are_named():
    with pytest.raises(ConfigError, match="marlin"):
        AwqConfig.from_dict({"version": "marlin"})
    weight = round_to_nearest(torch.randn(8, 32), 16, bits=3)
    with pytest.raises(ConfigError, match="4 bits"):
        get_format("gemm").pack(weight)
    with pytest.raises(ConfigError, match="multiple of 8"):
        get_format("gemm").pack(QuantizedWeight(*random_weight(32, 12, 16)[:3]))
