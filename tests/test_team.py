"""Several processes give the bytes of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from test_experts import mixture
from test_kinds import encoder_decoder
from test_streaming import saved, tensors

from awq.core.team import ALONE, Team, several_processes
from awq.errors import ConfigError
from awq.quantize.group import ROUNDED_VALUES, rounded_rows
from awq.quantize.input_error import InputErrorStatistics
from awq.quantize.statistics import InputStatistics

HERE = Path(__file__).parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def run(*command, processes):
    """A command, with so many processes of torchrun in front of it in one of a test's calls. All
    calls use GPUs when there is one for each process."""
    paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    if torch.cuda.device_count() < processes:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    # what torchrun itself adds at the end says nothing about the cause
    assert done.returncode == 0, done.stderr.partition("torch/distributed/elastic/")[0][-6000:]
    return done


def lines_of(folder):
    """What the report says of every linear."""
    report = json.loads((folder / "quantization_report.json").read_text())
    return [{k: v for k, v in line.items() if k != "seconds"} for line in report["linears"]]


def test_two_processes_give_the_bytes_of_one(tmp_path):
    """From memory and streamed; with gloo on a CPU."""
    models = tmp_path / "models"
    torch.manual_seed(0)
    for name in ("llama", "again"):
        saved(zoo.tiny_model("llama"), models / name)
    saved(mixture("mixtral"), models / "mixture")
    saved(zoo.tiny_model("bert"), models / "encoder")
    saved(encoder_decoder("t5"), models / "encoder_decoder")
    alone, both = tmp_path / "alone", tmp_path / "both"
    script = str(HERE / "team_cases.py")
    run(sys.executable, script, str(models), str(alone), processes=2)
    run(*TORCHRUN, "2", script, str(models), str(both), processes=2)
    for folder in sorted(alone.iterdir()):
        expected, found = tensors(folder), tensors(both / folder.name)
        assert expected.keys() == found.keys() and expected
        assert all(torch.equal(expected[name], found[name]) for name in expected), folder.name
        assert lines_of(folder) == lines_of(both / folder.name)
    assert sorted(path.name for path in both.iterdir()) == sorted(p.name for p in alone.iterdir())


def test_the_command_by_torchrun(tmp_path):
    """One process writes and tells; a work folder of three processes is gone."""
    source = saved(zoo.tiny_model("llama"), tmp_path / "source")
    texts = tmp_path / "texts.txt"
    texts.write_text("one two three four five six seven eight\n" * 40)
    given = ["--calib-data", str(texts), "--samples", "3", "--tokens", "16", "--group-size", "16"]
    command = ["quantize", str(source), str(tmp_path / "out"), "--stream", "--json", *given]
    done = run(*TORCHRUN, "3", "-m", "awq.cli", *command, processes=3)
    assert json.loads(done.stdout)["output"] == str(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "texts.txt"]


@pytest.mark.parametrize("rank", ["0", "2"])
def test_more_processes_than_gpus(rank, monkeypatch):
    """Each of them says so, before a process group is made."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "init_process_group", pytest.fail)
    for name, value in {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    said = r"3 processes were started for 2 GPUs, .*start 2 \(torchrun --nproc-per-node 2\)"
    with pytest.raises(ConfigError, match=said), several_processes():
        pytest.fail("no work begins")


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_piece_is_one_processs(size):
    pieces = range(60)  # dealt there and back without a rest
    owners = [[Team(rank, size).has(number) for rank in range(size)] for number in pieces]
    assert all(sum(owner) == 1 for owner in owners)
    work = [sum(number for number in pieces if owners[number][rank]) for rank in range(size)]
    assert len(set(work)) == 1  # of pieces that grow evenly


@pytest.mark.parametrize("out, width", [(28672, 4096), (4096, 14336), (57344, 8192), (8192, 28672)])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_rows_of_a_large_weight_are_rounded_in_equal_halves(out, width, kind):
    """Of two processes none waits for the other: 7B's and 70B's widest weights."""
    rows = rounded_rows(out, width, kind)
    pieces = [min(rows, out - start) for start in range(0, out, rows)]
    own = [sum(n for k, n in enumerate(pieces) if k % 2 == rank) for rank in range(2)]
    assert len(pieces) >= 2 and max(own) - min(own) < 0.01 * out
    assert rows * width <= ROUNDED_VALUES[kind] + width


def test_rows_of_a_small_weight_are_rounded_at_once():
    """Steps that wait for each other take as long for few rows as for many."""
    assert rounded_rows(4096, 4096, "cuda") == 4096
    assert rounded_rows(1, 1 << 30, "cpu") == 1


@pytest.mark.parametrize("width", [24, 50])
def test_panels_of_processes_add_up_to_the_matrix(width, monkeypatch):
    """Each sums its own rows; a Gram matrix is half summed and half copied."""
    for panel in ("PANEL", "NARROW_PANEL"):
        monkeypatch.setattr(f"awq.quantize.statistics.{panel}", 16)
    torch.manual_seed(1)
    batches = [(torch.randn(2, 9, width), torch.randn(2, 9, width)) for _ in range(3)]

    def summed(team):
        found = InputErrorStatistics(width, torch.device("cpu"), team=team)
        for now, original in batches:
            found.add_pair(now, original, None)
        return found

    whole, parts = summed(ALONE), [summed(Team(rank, 2)) for rank in range(2)]
    for name in ("gram", "error"):
        first, second = (getattr(part, name) for part in parts)
        assert torch.equal(first + second, getattr(whole, name))
        assert first.any() and second.any() and not (first.bool() & second.bool()).any()
    whole.complete()
    now = torch.cat([pair[0].flatten(0, 1) for pair in batches]).double()
    torch.testing.assert_close(whole.gram.double(), now.t() @ now, rtol=1e-5, atol=1e-4)
    assert torch.equal(whole.gram, whole.gram.t())


def test_a_narrow_input_is_summed_as_ever():
    """One panel: the bytes are those of one product a batch."""
    found, x = InputStatistics(40, torch.device("cpu")), torch.randn(3, 7, 40)
    found.add(x, None)
    found.complete()
    rows = x.flatten(0, 1)
    assert torch.equal(found.gram, torch.zeros(40, 40).addmm_(rows.t(), rows))
