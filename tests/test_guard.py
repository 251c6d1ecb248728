"""The CPU kernels touch nothing outside their operands: forbidden pages lie beside them."""

import subprocess
import sys
from pathlib import Path

import pytest

from awq.kernels.cpu import why_not
from awq.kernels.packed import Shape

CASES = Path(__file__).parent / "guard_cases.py"


@pytest.fixture(scope="module")
def done():
    import torch

    if why_not(torch.device("cpu"), torch.float32, Shape(128, 64, 128)):
        pytest.skip("needs a CPU with kernels")
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux")
    return subprocess.run([sys.executable, CASES], capture_output=True, text=True)


def test_kernels_stay_inside_their_operands(done):
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" cases, 0 wrong\n")


def test_the_fence_is_felt(done):
    assert "\nthe fence is felt\n" in done.stdout, done.stdout + done.stderr
