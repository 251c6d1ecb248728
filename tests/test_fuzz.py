"""A share of `make fuzz`: broken checkpoints are refused in one line, or give right values."""

import re
import subprocess
import sys
from pathlib import Path

MUTANTS = 80


def test_mutants_of_checkpoints():
    script = Path(__file__).parent / "fuzz.py"
    arguments = ["--mutants", str(MUTANTS), "--seed", "0"]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    counts = dict(re.findall(r'"([a-z ]+)": (\d+)', done.stdout))
    assert int(counts["refused"]) > MUTANTS and int(counts["right"]) > MUTANTS / 2
