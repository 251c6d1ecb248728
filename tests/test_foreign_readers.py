"""A gemm checkpoint of ours, read by readers that are not ours, gives the same dense weights."""

import importlib.util
import os

import pytest
import torch

from awq.core.weight import round_to_nearest
from awq.formats import get_format

SHAPES = [(64, 64, 64), (192, 40, 32), (384, 16, 128)]


def make(in_features, out_features, group_size):
    weight = round_to_nearest(torch.randn(out_features, in_features), group_size)
    return weight, get_format("gemm").pack(weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_compressed_tensors_converter(shape):
    module = pytest.importorskip(
        "compressed_tensors.entrypoints.convert.converters.autoawq",
        reason="compressed_tensors with a reader of AutoAWQ files is not installed",
    )
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    weight, tensors = make(*shape)
    converter = module.AutoAWQConverter(group_size=shape[2])
    theirs = converter.process({f"layer.{k}": v for k, v in tensors.items()})
    codes = unpack_from_int32(
        theirs["layer.weight_packed"], 4, torch.Size(theirs["layer.weight_shape"].tolist())
    )
    groups = shape[0] // shape[2]
    zeros = unpack_from_int32(
        theirs["layer.weight_zero_point"], 4, torch.Size((shape[1], groups)), packed_dim=0
    )
    delta = (codes.float() - zeros.float().repeat_interleave(shape[2], 1)) * theirs[
        "layer.weight_scale"
    ].float().repeat_interleave(shape[2], 1)
    assert torch.equal(delta, weight.dequantize())


@pytest.mark.parametrize("shape", SHAPES)
def test_autoawq_dequantize_gemm(shape):
    """Needs AutoAWQ 0.2.9's `awq/utils/packing_utils.py`; AUTOAWQ_PACKING_UTILS is its path."""
    path = os.environ.get("AUTOAWQ_PACKING_UTILS")
    if not path:
        pytest.skip("AUTOAWQ_PACKING_UTILS is not set")
    spec = importlib.util.spec_from_file_location("autoawq_packing_utils", path)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    weight, t = make(*shape)
    dense = theirs.dequantize_gemm(t["qweight"], t["qzeros"], t["scales"].float(), 4, shape[2])
    assert torch.equal(dense.t(), weight.dequantize())
