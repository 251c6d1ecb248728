"""The CPU kernels equal the reference on any shape, for any kind of CPU, and step aside where they
cannot be trusted."""

import math
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kernel_weights
import pytest
import torch
from kernel_weights import random_weight

from awq import backends
from awq.backends import operator, reasons
from awq.errors import ConfigError
from awq.formats import get_layout
from awq.kernels import Shape, choose, explain, reference, use_backend
from awq.kernels import cpu as backend
from awq.kernels.cpu import dense, engine, pool
from awq.kernels.cpu.product_launch import Product
from awq.kernels.cpu.products import emit_linear
from awq.kernels.cpu.targets import TARGETS
from awq.kernels.cpu.team import SIZE, UNTIL
from awq.native import pool as native_pool
from awq.nn.layout import concatenate_outputs, restore, split_outputs
from awq.nn.linear import WQLinear
from awq.nn.memory import available_memory

CPU = torch.device("cpu")
# inputs, outputs, group: odd rows, whole-row groups, groups that are cut into chunks, one group of
# eight.
SHAPES = [
    (128, 64, 128),
    (256, 24, 32),
    (136, 17, 136),
    (1232, 40, 616),
    (192, 41, 96),
    (24, 8, 8),
    (576, 96, 64),
    (512, 33, 512),
]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}


def pack(weight, layout="rows16"):
    return kernel_weights.pack(weight, layout)


def error(out, x, weight, bias=None):
    expected = reference.product(
        x.double(), weight.dequantize().double(), None if bias is None else bias.double()
    )
    return float((out.double() - expected).norm() / expected.norm())


def served(target):
    features = engine.binding().get_host_cpu_features()
    return all(features.get(name) for name in target.features)


@pytest.fixture
def forget():
    """Caches as in a new process, before and after."""
    caches = (backend.problem, backend.product, engine.program, engine.binding)
    caches += (engine.host_target, engine.openmp)
    backends.forget()
    for cached in caches:
        cached.cache_clear()
    yield lambda: [cached.cache_clear() for cached in caches]
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("shape", SHAPES)
def test_layout_is_exact_both_ways(shape):
    weight, codec = random_weight(*shape), get_layout("rows16")
    tensors = codec.pack(weight)
    assert {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()} == codec.shapes(*shape)
    assert all(t.is_contiguous() for t in tensors.values())
    assert all(torch.equal(a, b) for a, b in zip(codec.unpack(tensors, *shape)[:3], weight[:3]))


def test_nibbles_are_where_the_kernels_look():
    weight = random_weight(64, 40, 32)
    data = get_layout("rows16").pack(weight)["qweight"]
    for n, k in [(0, 0), (39, 63), (17, 5), (16, 2), (31, 12)]:
        byte = data[n // 16, k // 8, 4 * (n % 16) + k % 4]
        assert (byte >> (4 if k % 8 >= 4 else 0)) & 15 == weight.codes[n, k]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_every_kind_of_cpu_equals_the_dense_product(target, dtype):
    if not served(target):
        pytest.skip(f"needs a CPU with {target.name}")
    torch.manual_seed(0)
    kinds = [
        (Product(engine.Program(emit_linear, dtype, target, planes), planes), bound)
        for planes, bound in ((backend.PLANES[dtype], 0), (1, 3e-2))
    ]
    for shape in SHAPES:
        weight, bias = random_weight(*shape), torch.randn(shape[1]).to(dtype)
        packed = pack(weight)
        for product, bound in kinds:
            for tokens in (1, 2, 3, 15):
                x = torch.randn(tokens, shape[0]).to(dtype)
                for b in (None, bias):
                    assert error(product(x, packed, b), x, weight, b) < ROUNDING[dtype] + bound


@pytest.mark.parametrize("name, bound", [("cpu", 0), ("cpu_int8", 3e-2)])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("format", ["gemm", "gemv", "gemv_fast"])
def test_linear_equals_the_reference_and_saves_the_same_bytes(name, bound, dtype, format):
    weight = random_weight(192, 24, 64)
    module = WQLinear.from_quantized(weight, torch.randn(24), format).to(dtype)
    before = {k: t.clone() for k, t in module.state_dict().items()}
    for shape in ((192,), (5, 192), (2, 3, 192), (0, 192)):
        x = torch.randn(shape).to(dtype)
        with use_backend(name):
            out = module(x)
        assert out.shape == (*shape[:-1], 24) and out.dtype == dtype and module.layout == "rows16"
        if x.numel():
            assert error(out, x, weight, module.bias) < ROUNDING[dtype] + bound
    after = module.state_dict()
    assert all(torch.equal(after[k].view(torch.uint8), before[k].view(torch.uint8)) for k in before)
    restore(module)
    assert all(torch.equal(dict(module.named_buffers())[k], before[k]) for k in before)


def test_strided_input_and_bias_of_another_dtype():
    weight, x = random_weight(128, 24, 32), torch.randn(128, 6).t()
    bias = torch.randn(24).double()
    assert error(backend.linear(x, pack(weight), bias), x, weight, bias) < 1e-6


def test_a_token_does_not_depend_on_the_others_nor_on_threads(monkeypatch):
    monkeypatch.setattr(pool, "cores_at_start", lambda: 8)
    weight, x = random_weight(1232, 200, 616), torch.randn(70, 1232)
    packed, before = pack(weight), torch.get_num_threads()
    whole = backend.linear(x, packed, None)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(backend.linear(x, packed, None), whole)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(
        torch.cat([backend.linear(x[i : i + 1], packed, None) for i in range(70)]), whole
    )


@pytest.mark.parametrize("inputs, outputs, group", SHAPES)
def test_dense_weights_for_matrix_units(inputs, outputs, group, monkeypatch):
    """The dense weight is the canonical one rounded to bfloat16, in one piece or several, from many
    tokens on only."""
    weight = random_weight(inputs, outputs, group)
    packed, bias = pack(weight), torch.randn(outputs)
    assert torch.equal(dense.dequantized(packed, 0, outputs), weight.dequantize(torch.bfloat16))
    assert outputs <= 16 or torch.equal(
        dense.dequantized(packed, 16, outputs), weight.dequantize(torch.bfloat16)[16:]
    )
    x = torch.randn(2, backend.MATRIX_UNIT_MIN_TOKENS // 2, inputs).bfloat16()
    whole = dense.linear(x, packed, bias)
    assert whole.shape == (2, backend.MATRIX_UNIT_MIN_TOKENS // 2, outputs)
    assert error(whole, x, weight, bias) < 2 * ROUNDING[torch.bfloat16]
    monkeypatch.setattr(dense, "MAX_DENSE_VALUES", 16 * inputs)
    assert error(dense.linear(x, packed, bias), x, weight, bias) < 2 * ROUNDING[torch.bfloat16]
    for unit in (True, False):
        monkeypatch.setattr(backend, "has_matrix_unit", lambda unit=unit: unit)
        few = backend.linear(x[:1], packed, bias)
        assert error(few, x[:1], weight, bias) < ROUNDING[torch.bfloat16]
        with monkeypatch.context() as patch:
            patch.setattr(dense, "linear", lambda *_: None)
            assert (backend.linear(x, packed, bias) is None) == unit


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_its_token_only(value):
    x = torch.randn(3, 128)
    x[1, 5] = value
    out = backend.linear(x, pack(random_weight(128, 24, 32)), None)
    assert not out[1].isfinite().any() and out[[0, 2]].isfinite().all()


def test_large_small_and_zero_activations():
    weight = random_weight(256, 24, 128)
    for factor in (1e30, 1e-30):
        x = torch.randn(2, 256) * factor
        assert error(backend.linear(x, pack(weight), None), x, weight) < 1e-6
    assert not backend.linear(torch.zeros(2, 256), pack(weight), None).any()


def test_without_openmp_python_threads_compute_the_same(monkeypatch, forget):
    weight, x = random_weight(256, 200, 128), torch.randn(9, 256)
    packed = pack(weight)
    expected = backend.linear(x, packed, None)
    assert not sys.platform.startswith("linux") or engine.openmp()
    monkeypatch.setattr(engine, "openmp", dict)
    kernel = engine.Program(emit_linear, torch.float32, engine.host_target(), 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(pool, "cores_at_start", lambda: 8)
    assert torch.equal(Product(kernel, 3)(x, packed, None), expected)


def test_siblings_are_joined_and_split():
    parts = [
        WQLinear.from_quantized(random_weight(128, n, 32, seed=n), bias)
        for n, bias in ((24, torch.randn(24)), (8, None))
    ]
    x = torch.randn(3, 128)
    separate = torch.cat([part(x) for part in parts], -1)
    assert all(part.layout == "rows16" for part in parts)
    joined = concatenate_outputs(parts)
    assert torch.equal(joined(x), separate)
    assert all(torch.equal(a(x), b(x)) for a, b in zip(parts, split_outputs(joined, [24, 8])))


def test_gradient_reaches_the_input():
    module = WQLinear.from_quantized(random_weight(128, 24, 32))
    x, grad = torch.randn(3, 128, requires_grad=True), torch.randn(3, 24)
    module(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ module.dequantize())


def test_reasons():
    shape = Shape(128, 24, 32)
    assert (
        choose(CPU, torch.float32, shape) == "cpu"
        and choose(CPU, torch.float64, shape) == "reference"
    )
    assert "weights are on cuda" in backend.why_not(torch.device("cuda"), torch.float16, shape)
    assert "float64" in backend.why_not(CPU, torch.float64, shape)
    assert "group_size 12 is not a multiple of 8" in backend.why_not(
        CPU, torch.float32, Shape(24, 8, 12)
    )
    found = explain(
        WQLinear.from_quantized(random_weight(*shape)).to(torch.bfloat16), torch.bfloat16
    )
    assert "cpu" in (found.backend, *found.others) and "triton" in found.others
    module = WQLinear.from_quantized(random_weight(24, 8, 12))
    assert torch.equal(
        module(torch.ones(24)), reference.linear(torch.ones(24), module.packed, None)
    )


def test_a_wrong_library_is_found_and_passed_over(monkeypatch, forget):
    right = Product.__call__
    monkeypatch.setattr(Product, "__call__", lambda *arguments: right(*arguments) * 1.01)
    assert "trial product was wrong" in reasons(CPU, torch.float32, Shape(128, 24, 32))["cpu"]
    weight, x = random_weight(128, 24, 32), torch.randn(2, 128)
    module = WQLinear.from_quantized(weight)
    assert error(module(x), x, weight) < 6e-3 and module.layout != "rows16"
    with use_backend("cpu"), pytest.raises(ConfigError, match="cpu cannot serve"):
        module(x)


def test_a_library_that_fails_is_passed_over(monkeypatch, forget):
    def refuse(*arguments):
        raise RuntimeError("LLVM ERROR: no executable memory\nmore")

    monkeypatch.setattr(engine, "machine_code", refuse)
    assert "no executable memory" in backend.why_not(CPU, torch.float32, Shape(128, 24, 32))
    forget()
    monkeypatch.setattr(backend, "host_target", lambda: None)
    assert "no AVX2" in backend.why_not(CPU, torch.float32, Shape(128, 24, 32))


def test_without_llvmlite_the_model_still_computes(monkeypatch, forget):
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    assert "autoawq[cpu]" in backend.why_not(CPU, torch.float32, Shape(128, 24, 32))
    weight, x = random_weight(128, 24, 32), torch.randn(2, 128)
    assert error(WQLinear.from_quantized(weight)(x), x, weight) < 6e-3


# What the product of bytes must become on CPUs that this machine need not have.
OTHERS = [
    ("x86_64-linux-gnu", "haswell", "avx2", "vpmaddubsw"),
    ("x86_64-linux-gnu", "alderlake", "avxvnni", "vpdpbusd"),
    ("x86_64-linux-gnu", "skylake-avx512", "avx512bw", "vpmaddubsw"),
    ("x86_64-linux-gnu", "icelake-server", "avx512vnni", "vpdpbusd"),
    ("x86_64-pc-windows-msvc", "haswell", "avx2", "vpmaddubsw"),
    ("aarch64-linux-gnu", "neoverse-n1", "dotprod", "sdot"),
    ("arm64-apple-darwin", "apple-m1", "dotprod", "sdot"),
]


@pytest.mark.parametrize("triple, cpu, name, instruction", OTHERS)
def test_compiles_for_other_cpus(triple, cpu, name, instruction):
    target = next(target for target in TARGETS if target.name == name)
    machine = engine.binding().Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    for planes in (1, 3):
        module, _ = engine.kernel_module(emit_linear, torch.bfloat16, (target, planes), True)
        code = machine.emit_assembly(engine.machine_code(module, machine))
        assert code.count(instruction) >= 2


def test_no_compiler_is_needed(tmp_path):
    """A process that finds no program at all loads, computes and stays on the fast kernels."""
    code = """
import shutil, torch
assert shutil.which("cc") is None and shutil.which("gcc") is None
import awq
from awq.nn.linear import WQLinear
from awq.core.weight import round_to_nearest
module = WQLinear.from_quantized(round_to_nearest(torch.randn(32, 64), 32)).to(torch.bfloat16)
module(torch.randn(2, 64, dtype=torch.bfloat16))
assert module.layout == "rows16", awq.kernels.explain(module, torch.bfloat16)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "AWQ_BACKEND")} | {
        "PATH": str(tmp_path)
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ROUNDING)
def test_kernels_of_a_decode_step_equal_plain_operators(dtype):
    import decoding_cases as cases

    assert (
        operator("attend", torch.device("cpu"), dtype).__module__ == "awq.kernels.cpu.decode_launch"
    )
    for name, (attention, lengths) in cases.ATTENTIONS.items():
        assert cases.attention_error(attention, lengths, dtype, "cpu") < ROUNDING[dtype], name
    for width, mean, bias in ((64, False, False), (100, True, True), (2048, False, True)):
        assert cases.norm_error(width, mean, bias, dtype, "cpu") < ROUNDING[dtype], width
    for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
        for gated in (True, False):
            assert cases.activation_error(name, gated, dtype, "cpu") < ROUNDING[dtype], name


@pytest.mark.parametrize("dtype", ROUNDING)
def test_head_of_few_tokens(dtype):
    from awq.generate.run.operations import head

    for inputs, outputs in ((100, 333), (576, 64), (7, 3)):
        linear, x = (
            torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype),
            torch.randn(3, inputs, dtype=dtype),
        )
        found, expected = head(x, linear), x.double() @ linear.weight.double().t()
        assert found.dtype == torch.float32 and (found - expected).norm() / expected.norm() < 1e-6


def test_activations_of_extreme_values():
    from awq.kernels.cpu import decode_launch

    h = torch.tensor(
        [[float("nan"), float("inf"), -float("inf"), 0.0, -100.0, 100.0, 1e-20, -1e-20]]
    ).repeat(1, 3)
    for name, function in (
        ("silu", torch.nn.functional.silu),
        ("gelu", torch.nn.functional.gelu),
        ("relu", torch.relu),
    ):
        found, expected = decode_launch.activate(h, name, False), function(h)
        torch.testing.assert_close(
            found[:, [3, 4, 5, 6, 7]], expected[:, [3, 4, 5, 6, 7]], atol=1e-6, rtol=1e-6
        )
        assert found[:, 0].isnan().all() and found[:, 1].isposinf().all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
def test_nothing_keeps_the_checkpoint_mapped(tmp_path):
    from safetensors.torch import load_file, save_file

    from awq.nn.memory import leave_files

    save_file(
        {"weight": torch.randn(64, 64), "offset": torch.randn(64)},
        str(tmp_path / "model.safetensors"),
    )
    model, stored = (
        torch.nn.Linear(64, 64, bias=False),
        load_file(str(tmp_path / "model.safetensors")),
    )
    expected = stored["weight"].clone()
    model.weight = torch.nn.Parameter(stored.pop("weight"))
    model.register_buffer("offset", stored.pop("offset"))
    model.tied = model.weight
    mapped = str(tmp_path) in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert leave_files(model) == (4 * 65 * 64 if mapped else 0)
    assert torch.equal(model.weight, expected) and model.tied is model.weight
    assert leave_files(model) == 0


def test_a_task_is_filled_by_name_and_by_nothing_else():
    from awq.kernels.cpu.task import COUNT, ELEMENT, FLOAT, Array, Task

    task = Task(threads=COUNT, x=Array(ELEMENT), eps=FLOAT, rows=COUNT)
    x = torch.zeros(3)
    packed = task.pack(rows=7, eps=0.5, x=x, threads=-1)
    assert struct.unpack("<qqf4xq", packed) == (-1, x.data_ptr(), 0.5, 7)
    with pytest.raises(TypeError, match="eps"):
        task.pack(rows=7, x=x, threads=1)
    with pytest.raises(TypeError, match="heads"):
        task.pack(rows=7, eps=0.5, x=None, threads=1, heads=2)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_smaller_team_changes_no_bit(size, monkeypatch):
    monkeypatch.setattr(pool, "cores_at_start", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    linear = WQLinear.from_quantized(random_weight(256, 96, 128))
    x = torch.randn(3, 256)
    state = engine._team_state()
    before = list(state)
    try:
        state[UNTIL] = 0
        whole = linear(x)
        state[UNTIL], state[SIZE] = 2**62, size  # nanoseconds that never come
        assert torch.equal(linear(x), whole)
    finally:
        state[:] = before


def test_torchs_own_openmp_comes_before_copies_in_a_folder_called_torch(tmp_path, monkeypatch):
    """Threads of another copy would be a second pool, and torch's own would not be told."""
    folder = tmp_path / "torch" / "site-packages"
    monkeypatch.setattr(torch, "__file__", str(folder / "torch" / "__init__.py"))
    files = (
        "a.libs/libgomp-1.so",
        "torch/lib/libgomp.so.1",
        "z.libs/libomp.so",
        "torch/lib/c10.so",
    )
    lines = [f"7f-80 r-xp 00000000 08:01 1234   {folder / file}\n" for file in files]
    maps = tmp_path / "maps"
    maps.write_text("".join([*lines, "7f-80 rw-p 00000000 00:00 0\n"]))
    monkeypatch.setattr(engine, "_MAPS", maps)
    expected = ("torch/lib/libgomp.so.1", "a.libs/libgomp-1.so", "z.libs/libomp.so")
    assert engine._loaded_openmp() == [str(folder / file) for file in expected]


def test_torch_on_one_core_is_the_calling_threads_alone():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), engine.torch_on_one_core():
        inside = torch.get_num_threads()
        with ThreadPoolExecutor(1) as other:
            elsewhere = other.submit(torch.get_num_threads).result()
        raise ZeroDivisionError
    assert torch.get_num_threads() == before == elsewhere
    assert inside == (1 if engine.openmp() else before)


@pytest.mark.parametrize(
    "membership, files, cores",
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ("0::/a/b", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "400000 100000"}, 1),
        ("0::/elsewhere", {"cpu.max": "50000 100000"}, 0.5),
        (
            "3:cpu,cpuacct:/a\n2:memory:/b",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "300000", "cpu,cpuacct/a/cpu.cfs_period_us": "1e5"},
            math.inf,
        ),
        ("1:cpu:/a", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "50000"}, 1),
        (
            "1:cpu:/a",
            {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "50000"},
            math.inf,
        ),
        ("", {}, math.inf),
    ],
)
def test_the_quota_is_the_least_of_all_groups_above(
    membership, files, cores, tmp_path, monkeypatch
):
    control_groups(membership, files, tmp_path, monkeypatch)
    assert native_pool._quota() == cores


def control_groups(membership, files, folder, monkeypatch):
    monkeypatch.setattr(native_pool, "CGROUPS", folder)
    monkeypatch.setattr(native_pool, "MEMBERSHIP", folder / "membership")
    for name, text in {"membership": membership, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    "membership, files",
    [
        ("0::/", {"memory.max": "5000", "memory.current": "2000"}),
        (
            "0::/a/b",
            {
                "a/memory.max": "5000",
                "a/memory.current": "2000",
                "a/b/memory.max": "max",
                "a/b/memory.current": "1000",
            },
        ),
        (
            "4:memory:/a",
            {"memory/a/memory.limit_in_bytes": "5000", "memory/a/memory.usage_in_bytes": "2000"},
        ),
    ],
)
def test_the_groups_above_bound_memory_too(membership, files, tmp_path, monkeypatch):
    control_groups(membership, files, tmp_path, monkeypatch)
    assert available_memory() == 3000


CACHED = {
    "memory.stat": "anon 100\nfile 1900\nfile_dirty 300\nfile_writeback 100\n"
    "inactive_file 700\nactive_file 600\nslab_reclaimable 50",
    "memory/memory.stat": "cache 1\ninactive_file 1\nactive_file 2\ndirty 3\ntotal_cache 1900\n"
    "total_dirty 300\ntotal_writeback 100\ntotal_inactive_file 700\ntotal_active_file 600",
}


@pytest.mark.parametrize(
    "membership, folder, names",
    [
        ("0::/", "", ("memory.max", "memory.current")),
        ("4:memory:/", "memory/", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ],
)
@pytest.mark.parametrize(
    "statistics, left",
    [
        (None, 3900),
        ("inactive_file 700\nbroken", 3000),
        ("{dirty} 500\n{cached} 200", 3000),
        ("", 3000),
    ],
)
def test_pages_of_files_are_memory_that_is_left(
    membership, folder, names, statistics, left, tmp_path, monkeypatch
):
    """A group is charged for what it has read of files; only what is unwritten cannot go at once.
    statistics: what memory.stat says; None: `CACHED`, with a group's own and all groups' pages."""
    path, total = f"{folder}memory.stat", "total_" if folder else ""
    dirty = "total_dirty" if folder else "file_dirty"
    text = CACHED[path] if statistics is None else statistics
    text = text.format(dirty=dirty, cached=f"{total}inactive_file")
    files = dict(zip((folder + name for name in names), ("5000", "2000"))) | {path: text}
    control_groups(membership, files, tmp_path, monkeypatch)
    assert available_memory() == left
