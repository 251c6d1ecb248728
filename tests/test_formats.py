"""Codecs: exactly invertible, in the layouts that other readers expect."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from awq.config import FORMATS, AwqConfig
from awq.core.weight import QuantizedWeight, round_to_nearest
from awq.errors import ConfigError
from awq.formats import get_format
from awq.utils.packing_utils import dequantize_gemm

SHAPES = [
    (64, 64, 64),
    (64, 8, 64),
    (128, 8, 16),
    (192, 40, 32),
    (384, 16, 128),
    (256, 64, 256),
    (1536, 24, 128),
]


def rounded_weight(in_features, out_features, group_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return round_to_nearest(torch.randn(out_features, in_features, generator=generator), group_size)


@pytest.mark.parametrize("name", ["gemm", "gemv", "gemv_fast"])
@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_inverts_pack(name, shape):
    weight, codec = rounded_weight(*shape), get_format(name)
    tensors = codec.pack(weight)
    for key, (size, dtype) in codec.shapes(*shape).items():
        assert tuple(tensors[key].shape) == size and tensors[key].dtype == dtype
        assert str(dtype).removeprefix("torch.") in FORMATS[name]
    assert codec.features_of(tensors["qweight"]) == shape[:2]
    # Tensors of a file have other strides than fresh ones where a dimension is 1, and slices have
    # strides of their own.
    from_file = {k: t.clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    sliced = {k: torch.cat((t, t), -1)[:, : t.shape[1]] for k, t in tensors.items()}
    for given in (tensors, from_file, sliced):
        for a, b in zip(codec.unpack(given, *shape), weight):
            assert (a == b) if isinstance(a, int) else torch.equal(a, b)
    assert all(t.stride() == from_file[k].stride() for k, t in tensors.items())


def test_gemm_bits_are_where_the_format_says():
    weight = rounded_weight(32, 16, 16)
    tensors = get_format("gemm").pack(weight)
    for k in range(32):
        for column in range(2):
            word = int(tensors["qweight"][k, column]) & 0xFFFFFFFF
            for i, offset in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                assert (word >> (4 * i)) & 15 == int(weight.codes[8 * column + offset, k])


def test_gemv_bits_are_where_the_format_says():
    weight = rounded_weight(64, 8, 32)
    tensors = get_format("gemv").pack(weight)
    assert tensors["qzeros"].shape == (8, 4) and tensors["scales"].shape == (8, 32)
    for row in range(8):
        for word in range(8):
            value = int(tensors["qweight"][row, word]) & 0xFFFFFFFF
            assert [(value >> (4 * i)) & 15 for i in range(8)] == weight.codes[
                row, 8 * word : 8 * word + 8
            ].tolist()
    assert not tensors["scales"][:, 2:].any()


def spelled_out_gemv_fast(codes):
    """The interleaving written as the format's description reads, one step at a time."""
    rows, width = codes.shape
    c = (
        codes.reshape(rows, width // 32, 32)
        .reshape(rows, width // 32, 4, 4, 2)
        .permute(0, 1, 3, 2, 4)
    )
    c = c.reshape(rows, width // 32, 4, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(rows, width)
    c = (
        c.reshape(rows // 4, 4, width // 64, 64)
        .permute(0, 2, 1, 3)
        .reshape(rows // 4, width // 64, 64, 4)
        .int()
    )
    words = c[..., 0] | c[..., 1] << 4 | c[..., 2] << 8 | c[..., 3] << 12
    return (
        words.reshape(rows // 4, width)
        .to(torch.int32)
        .apply_(lambda v: v - 65536 if v >= 32768 else v)
        .to(torch.int16)
    )


def test_gemv_fast_bits_are_where_the_format_says():
    weight = rounded_weight(128, 8, 64)
    tensors = get_format("gemv_fast").pack(weight)
    assert torch.equal(tensors["qweight"], spelled_out_gemv_fast(weight.codes))
    scaled = -(weight.scales.float() * weight.zeros.float()).half().t()
    assert torch.equal(tensors["qzeros"][:2], scaled)


@pytest.mark.parametrize("name", ["gemm", "gemv", "gemv_fast"])
def test_dense_weight_spelled_out(name):
    """Every weight computed alone from the words, as the description of the format reads."""
    weight = rounded_weight(64, 8, 32)
    t = get_format(name).pack(weight)
    words = {k: v.tolist() for k, v in t.items()}
    place = {column: i for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7])}

    def value(o, k):
        g = k // 32
        if name == "gemm":
            q, z = (
                (row[o // 8] >> (4 * place[o % 8])) & 15
                for row in (words["qweight"][k], words["qzeros"][g])
            )
            return (q - z) * words["scales"][g][o]
        if name == "gemv":
            q, z = (
                (words["qweight"][o][k // 8] >> (4 * (k % 8))) & 15,
                (words["qzeros"][o][g // 8] >> (4 * (g % 8))) & 15,
            )
            return (q - z) * words["scales"][o][g]
        x = k % 32
        # nibble inside its four rows
        at = (o % 4) * 64 + (k % 64) // 32 * 32 + (x % 8 // 2) * 8 + (x % 2) * 4 + x // 8
        q = (words["qweight"][o // 4][k // 64 * 64 + at // 4] >> (4 * (at % 4))) & 15
        return q * words["scales"][g][o] + words["qzeros"][g][o]

    dense = torch.tensor([[value(o, k) for k in range(64)] for o in range(8)])
    tolerance = 1e-3 if name == "gemv_fast" else 0.0  # its s·z is rounded to float16
    torch.testing.assert_close(dense, weight.dequantize(), rtol=0, atol=tolerance)


# Packs with AutoAWQ's own classes. The packages are empty shells because its `awq/__init__.py`
# imports every model it knows.
AUTOAWQ_PACKER = """
import sys, types, torch
root, path = sys.argv[1:]
for name in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [root + "/" + name.replace(".", "/")]
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.modules.linear.gemv import WQLinear_GEMV
from awq.modules.linear.gemv_fast import WQLinear_GEMVFast
jobs = torch.load(path)
for job in jobs:
    name, codes, scales, zeros = (job[k] for k in ("name", "codes", "scales", "zeros"))
    group = codes.shape[1] // scales.shape[1]
    linear = torch.nn.Linear(codes.shape[1], codes.shape[0], bias=False)
    steps = codes.float() - zeros.float().repeat_interleave(group, 1)
    linear.weight.data = (steps * scales.float().repeat_interleave(group, 1)).half()
    given = (scales.t(), zeros.t().float()) if name == "gemm" else (scales, zeros.float())
    kind = {"gemm": WQLinear_GEMM, "gemv": WQLinear_GEMV, "gemv_fast": WQLinear_GEMVFast}[name]
    packed = kind.from_linear(linear.half(), 4, group, False, *(v.contiguous() for v in given))
    job["tensors"] = {k: getattr(packed, k) for k in ("qweight", "qzeros", "scales")}
torch.save(jobs, path)
"""


def test_tensors_packed_by_autoawq(tmp_path):
    """AutoAWQ 0.2.9 packs, we read, in all three formats; AUTOAWQ_PACKING_UTILS names its
    `awq/utils/packing_utils.py`."""
    source = os.environ.get("AUTOAWQ_PACKING_UTILS")
    if not source:
        pytest.skip("AUTOAWQ_PACKING_UTILS is not set")
    cases = [
        (n, s)
        for n in ("gemm", "gemv", "gemv_fast")
        for s in ((256, 64, 64), (512, 128, 128), (256, 64, 32))
    ]
    weights = [rounded_weight(*shape, seed=i) for i, (_, shape) in enumerate(cases)]
    jobs = [
        {"name": n, "codes": w.codes, "scales": w.scales, "zeros": w.zeros}
        for (n, _), w in zip(cases, weights)
    ]
    torch.save(jobs, tmp_path / "jobs.pt")
    root = str(Path(source).resolve().parents[2])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", AUTOAWQ_PACKER, root, str(tmp_path / "jobs.pt")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for job, (name, shape), weight in zip(torch.load(tmp_path / "jobs.pt"), cases, weights):
        read = get_format(name).unpack(job["tensors"], *shape)
        assert all(torch.equal(a, b) for a, b in zip(read[:3], weight[:3])), (name, shape)
        ours = get_format(name).pack(weight)
        assert all(torch.equal(ours[k], job["tensors"][k]) for k in ours), (name, shape)


@pytest.mark.parametrize("name", ["gemm", "gemv", "gemv_fast"])
def test_a_large_matrix_packs_and_unpacks_quickly(name):
    """4096 × 4096 in well under a second; AutoAWQ's loop takes 4.8 s. The best of three, for busy
    machines."""
    codec = get_format(name)
    codes = torch.randint(0, 16, (4096, 4096), dtype=torch.uint8)
    weight = QuantizedWeight(
        codes, torch.ones(4096, 32).half(), torch.full((4096, 32), 8, dtype=torch.uint8)
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        read = codec.unpack(codec.pack(weight), 4096, 4096, 128)
        seconds.append(time.perf_counter() - start)
    assert torch.equal(read.codes, codes) and min(seconds) < 1


@pytest.mark.parametrize("name", ["gemm", "gemv", "gemv_fast"])
def test_values_out_of_range_do_not_reach_their_neighbours(name):
    codes = torch.tensor([255, 3]).to(torch.uint8).repeat(8, 32)
    zeros = torch.tensor([200, 1]).to(torch.uint8).repeat(8, 1)
    read = get_format(name).unpack(
        get_format(name).pack(QuantizedWeight(codes, torch.ones(8, 2).half(), zeros)), 64, 8, 32
    )
    assert torch.equal(read.codes, codes.clamp(max=15)) and torch.equal(
        read.zeros, zeros.clamp(max=15)
    )


def test_gemv_fast_keeps_every_zero_point_or_says_why_not():
    codec, zeros = get_format("gemv_fast"), torch.arange(16, dtype=torch.uint8).repeat(4, 1)
    codes = torch.randint(0, 16, (4, 1024), dtype=torch.uint8)
    for scale in (2.0**-24, 1e-6, 1e-3, 1.0, 4000.0):
        weight = QuantizedWeight(codes, torch.full((4, 16), scale).half(), zeros)
        assert torch.equal(codec.unpack(codec.pack(weight), 1024, 4, 64).zeros, zeros), scale
    with pytest.raises(ConfigError, match="overflows"):
        codec.pack(QuantizedWeight(codes, torch.full((4, 16), 5000.0).half(), zeros))


def test_compat_dequantize_gemm_reads_ours():
    weight = rounded_weight(192, 40, 32)
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
        get_format("gemm").pack(QuantizedWeight(*rounded_weight(32, 12, 16)[:3]))


def test_a_bijective_format_gives_any_bytes_back():
    codec = get_format("gemm")
    assert (
        codec.bijective
        and not get_format("gemv").bijective
        and not get_format("gemv_fast").bijective
    )
    tensors = codec.empty(64, 24, 32)
    for tensor in tensors.values():
        tensor.view(torch.uint8).random_(0, 256)
    again = codec.pack(codec.unpack(tensors, 64, 24, 32))
    assert all(
        torch.equal(tensors[k].view(torch.uint8), again[k].view(torch.uint8)) for k in tensors
    )
