"""Triton kernels without a GPU: their arithmetic in the interpreter, and their machine code for
every target."""

import json
import os
import subprocess
import sys
from pathlib import Path

import offline
import pytest
import torch

from awq import backends
from awq.kernels import Shape
from awq.kernels.triton import configs, direct_launch, why_not
from awq.kernels.triton.direct_launch import Direct

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def errors():
    """Case of tests/triton_cases.py → relative error in the interpreter."""
    done = subprocess.run(
        [sys.executable, HERE / "triton_cases.py"],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_arithmetic_equals_float64(errors):
    assert len(errors) == 30
    limits = {"dense": 1e-6, "dense, in pieces": 8e-3}
    # rounded three times: inside, by the weights' product and by the weight of the expert
    limits |= {name: 1e-3 for name in errors if "mixture" in name}
    wrong = {name: value for name, value in errors.items() if not value < limits.get(name, 5e-4)}
    assert not wrong


def test_reasons():
    gpu, shape = torch.device("cuda", 0), Shape(256, 64, 128)
    assert "on cpu" in why_not(torch.device("cpu"), torch.float16, shape)
    assert "float64" in why_not(gpu, torch.float64, shape)
    assert "group_size 16" in why_not(gpu, torch.float16, Shape(256, 64, 16))
    assert backends.choose(torch.device("cpu"), torch.float16, shape) != "triton"


def test_rule_gives_launchable_configurations():
    for tokens in (1, 2, 7, 16, 33, 64, 100, 256):
        for n, k in ((8, 128), (72, 4224), (4096, 4096), (151936, 896)):
            for architecture in ("sm80", "sm120", "gfx942"):
                c = configs.rule(architecture, 108, Shape(k, n, 32), tokens)
                assert c.bm >= (16 if architecture == "gfx942" else 8) and c.split <= max(
                    1, -(-k // 128)
                )
                assert c.bm >= min(tokens, 32) and c.bn in (32, 64, 128)
    assert configs.rule("sm80", 108, Shape(4096, 4096, 128), 1000) is None


# Every number of tokens on one target of each maker, the largest tile on all: a compilation takes
# some seconds. `benchmarks/kernels_offline.py` compiles all there is.
SIZES = [(torch.float16, 1), (torch.bfloat16, 16), (torch.float16, 64), (torch.bfloat16, 256)]
PRODUCTS = [
    (target, *size)
    for target in offline.TARGETS
    for size in (SIZES if target in (90, "gfx942") else SIZES[3:])
]
EXPERT_ROWS = [
    (target, rows)
    for target in offline.TARGETS
    for rows in ((2, 32, 128, 1024) if target == 90 else (32, 1024))
]


@pytest.mark.parametrize("target, dtype, tokens", PRODUCTS)
def test_compiles_for_every_target_without_spilling(target, dtype, tokens):
    name = target if isinstance(target, str) else f"sm{target}"
    shape = Shape(4096, 4096, 128)
    code = offline.compile_product(
        target, shape, configs.rule(name, 108, shape, tokens), dtype, bias=True
    )
    assert len(code.binary) > 1000 and code.spilled == 0
    assert code.shared <= {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}.get(target, 64) * 1024


@pytest.mark.parametrize("target, rows", EXPERT_ROWS)
def test_experts_compile_for_every_target_without_spilling(target, rows):
    name = target if isinstance(target, str) else f"sm{target}"
    shape = Shape(4096, 14336, 128)
    config = configs.config_for_experts(name, 108, shape, rows, 8)
    code = offline.compile_experts(
        target, shape, config, rows if rows <= 128 else None, torch.bfloat16
    )
    assert len(code.binary) > 1000 and code.spilled == 0
    assert code.shared <= {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}.get(target, 64) * 1024


@pytest.mark.parametrize("target", [80, 90, "gfx942"])
@pytest.mark.parametrize("product", ["first", "second"])
def test_products_of_one_token_compile(target, product):
    shape = Shape(4096, 28672, 128) if product == "first" else Shape(14336, 4096, 128)
    name = target if isinstance(target, str) else f"sm{target}"
    config = configs.rule_for_experts(name, 108, shape, 2, 8)
    form = {"gated": "silu"} if product == "first" else {"ahead": config.ahead(14336)}
    code = offline.compile_experts(target, shape, config, 1, **form)
    assert len(code.binary) > 1000 and code.spilled == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "kind, shape, form, gated",
    [
        ("product", Shape(2048, 5120, 128), Direct(16, 4), ""),
        ("product", Shape(4096, 2048, 128), Direct(16, 8), ""),
        ("product", Shape(896, 1152, 896), Direct(16, 4), "silu"),
        ("experts", Shape(2048, 1536, 128), Direct(16, 2, 168), "silu"),
        ("experts", Shape(1408, 2048, 128), Direct(32, 4), ""),
        ("sum", Shape(768, 2048, 128), Direct(16, 8), ""),
    ],
)
def test_products_of_one_token_hold_their_weights_without_spilling(kind, shape, form, gated, dtype):
    if form.registers and dtype == torch.bfloat16:
        form = Direct(16, 4)  # as `expert_form_for` has it
    code = offline.compile_direct(90, shape, form, dtype, kind, gated)
    assert len(code.binary) > 1000 and code.spilled == 0
    # weights go from memory to the tensor cores; only inputs and sums pass through shared memory
    assert code.shared <= 32 << 10


def test_forms_of_one_token(monkeypatch):
    monkeypatch.setattr(direct_launch, "architecture", lambda index: ("sm90", 132))
    forms = (direct_launch.form_for, direct_launch.expert_form_for, direct_launch.sum_form_for)
    for form in forms:
        form.cache_clear()
    try:
        assert direct_launch.form_for(0, Shape(2048, 5120, 128), 1) == Direct(16, 4)
        assert direct_launch.form_for(0, Shape(4096, 2048, 128), 1) == Direct(16, 8)
        for shape, tokens in (
            (Shape(4096, 14336, 128), 1),
            (Shape(2048, 5120, 64), 1),
            (Shape(2048, 5120, 128), 2),
        ):
            assert direct_launch.form_for(0, shape, tokens) is None
        qwen = Shape(2048, 1536, 128), Shape(768, 2048, 128)
        half, wide = torch.float16, torch.bfloat16
        assert direct_launch.expert_form_for(0, qwen[0], 1, 8, True, half) == Direct(16, 2, 168)
        assert direct_launch.expert_form_for(0, qwen[0], 1, 8, True, wide) == Direct(16, 4)
        assert direct_launch.sum_form_for(0, qwen[1], 1, 8) == Direct(16, 8)
        lite = Shape(2048, 2816, 128), Shape(1408, 2048, 128)
        assert direct_launch.expert_form_for(0, lite[0], 1, 6, True, half) is None
        assert direct_launch.sum_form_for(0, lite[1], 1, 6) is None
        assert direct_launch.expert_form_for(0, lite[1], 1, 6, False, half) == Direct(32, 4)
        mixtral = Shape(14336, 4096, 128)
        assert direct_launch.sum_form_for(0, mixtral, 1, 2) is None
    finally:
        for form in forms:
            form.cache_clear()


def test_experts_of_one_token_start_no_second_wave():
    """Qwen3-30B-A3B's gate and up, on an H100's 132 multiprocessors."""
    shape, rows, experts = Shape(2048, 1536, 128), 8, 128
    config = configs.rule_for_experts("sm90", 132, shape, rows, experts)
    programs = rows * -(-shape.out_features // config.bn) * config.split
    assert 2 * 132 <= programs <= 4 * 132


@pytest.mark.parametrize("target", [80, 90, "gfx942"])
def test_sorting_by_expert_compiles(target):
    for experts in (8, 128):
        code = offline.compile_route(target, experts, 64)
        assert len(code.binary) > 1000 and code.spilled == 0


def test_rule_for_experts():
    for rows, experts in (
        (1, 8),
        (2, 8),
        (32, 8),
        (128, 8),
        (129, 8),
        (1024, 8),
        (8, 128),
        (4096, 128),
        (40_000, 4),
        (300, 1),
    ):
        for architecture in ("sm80", "sm90", "gfx942", "gfx1100"):
            c = configs.config_for_experts(architecture, 108, Shape(4096, 1408, 128), rows, experts)
            assert c.bm >= (16 if architecture.startswith("gfx") else 8) and c.bm * c.split > 0


@pytest.mark.parametrize("target", [80, 90, "gfx942"])
def test_dense_kernel_compiles(target):
    code = offline.compile_dequantize(target, Shape(4224, 200, 128), torch.bfloat16)
    assert len(code.binary) > 1000 and code.spilled == 0


@pytest.mark.parametrize(
    "tokens, dtype, limit",
    [(1, torch.float16, 2.2), (1, torch.bfloat16, 2.5), (16, torch.float16, 3.5)],
)
def test_instructions_per_weight_on_hopper(tokens, dtype, limit):
    """An H100 at full bandwidth has issue slots for 4.6 per weight; the kernels on the on-disk
    layouts take 7.8 and more."""
    shape = Shape(4096, 4096, 128)
    config = configs.rule("sm90", 132, shape, tokens)
    code = offline.compile_product(90, shape, config, dtype)
    weights = config.bn * 128 / (32 * config.warps)
    assert 1.5 < len(code.instructions) / weights < limit
    assert any(op.startswith(("HMMA", "HGMMA")) for op in code.instructions)
    assert any(op.startswith("LDGSTS") for op in code.instructions)  # asynchronous copies


def test_measured_tables_hold_configurations():
    paths = sorted(configs.TABLES.glob("*.json"))
    assert paths
    for path in paths:
        for size, rows in configs.table(path.stem).items():
            n, k = map(int, size.split("x"))
            for tokens, row in rows.items():
                c = configs.config_for(path.stem, 132, Shape(k, n, 128), tokens)
                assert (c is None) == (row is None) and (
                    c is None or (c.split <= k // 128 and c.bm * c.split > 0)
                )
            beyond = configs.config_for(path.stem, 132, Shape(k, n, 128), max(rows) + 1)
            assert beyond is None


@pytest.mark.parametrize(
    "size, tokens", [("28672x4096", 1), ("4096x14336", 64), ("6144x4096", 512)]
)
def test_measured_configurations_do_not_spill(size, tokens):
    n, k = map(int, size.split("x"))
    for dtype in (torch.float16, torch.bfloat16):
        code = offline.compile_product(
            90, Shape(k, n, 128), configs.table("sm90", dtype)[size][tokens], dtype
        )
        assert code.spilled == 0 and code.shared <= 227 * 1024


@pytest.mark.parametrize(
    "target, tokens",
    [(80, 16), (90, 1), (90, 64), (90, 512), (100, 8), ("gfx942", 8), ("gfx1100", 32)],
)
def test_products_with_an_activation_do_not_spill(target, tokens):
    shape, name = Shape(4096, 28672, 128), target if isinstance(target, str) else f"sm{target}"
    config = configs.config_for(name, 108, shape, tokens)
    code = offline.compile_product(target, shape, config, bias=True, gated="silu")
    assert len(code.binary) > 1000 and code.spilled == 0


def test_a_compiled_kernel_is_not_called_with_other_dtypes():
    from awq.kernels.triton.matmul_launch import _matmul

    common, config = (
        (None, torch.float16, Shape(256, 64, 128)),
        configs.Config(16, 64, 1, False, 4, 2),
    )
    dtypes = (None, torch.float16, torch.float32, torch.bfloat16)
    assert len({id(_matmul(*common, config, bias, "")) for bias in dtypes}) == 4
    assert _matmul(*common, config, torch.float16, "") is _matmul(
        *common, config, torch.float16, ""
    )


def test_counters_are_zero_and_large_enough():
    from awq.kernels.triton.launcher import Counters

    counters = Counters(torch.device("cpu"))
    few, many = counters.take(3), counters.take(100_000)
    assert (
        few.numel() >= 3
        and many.numel() >= 100_000
        and not many.any()
        and many.dtype == torch.int32
    )
    assert counters.take(5).data_ptr() == many.data_ptr()
