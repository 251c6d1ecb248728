"""Triton kernels without a GPU: their arithmetic in the interpreter, and their machine code for every target."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from awq.kernels import Shape, backends
from awq.kernels.triton import configs, why_not

pytest.importorskip("triton", reason="Triton is not installed (pip install 'autoawq[kernels]')")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def errors():
    """Case of tests/triton_cases.py → relative error in the interpreter."""
    done = subprocess.run(
        [sys.executable, HERE / "triton_cases.py"], capture_output=True, text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_arithmetic_equals_float64(errors):
    assert len(errors) == 15
    limits = {"dense": 1e-6, "dense, in pieces": 8e-3}
    wrong = {name: value for name, value in errors.items() if not value < limits.get(name, 5e-4)}
    assert not wrong


def test_reasons():
    gpu, shape = torch.device("cuda", 0), Shape(256, 64, 128)
    assert "on cpu" in why_not(torch.device("cpu"), torch.float16, shape)
    assert "float64" in why_not(gpu, torch.float64, shape)
    assert "group_size 16" in why_not(gpu, torch.float16, Shape(256, 64, 16))
    assert backends.choose(torch.device("cpu"), torch.float16, shape) == "reference"


def test_rule_gives_launchable_configurations():
    for tokens in (1, 2, 7, 16, 33, 64, 100, 256):
        for n, k in ((8, 128), (72, 4224), (4096, 4096), (151936, 896)):
            for architecture in ("sm80", "sm120", "gfx942"):
                c = configs.rule(architecture, 108, Shape(k, n, 32), tokens)
                assert c.bm >= (16 if architecture == "gfx942" else 8) and c.split <= max(1, -(-k // 128))
                assert c.bm >= min(tokens, 128) and c.bn in (32, 64, 128)
    assert configs.rule("sm80", 108, Shape(4096, 4096, 128), 1000) is None
