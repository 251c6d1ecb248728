"""What a plan says is what quantizing does."""

import json
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from test_streaming import IDS, KINDS, SETTINGS, same, saved
from transformers import LlamaConfig, LlamaForCausalLM

from awq import plan_quantization, quantize_directory
from awq.cli import main
from awq.core.team import Team
from awq.errors import CheckpointError, ConfigError
from awq.nn.hidden import Room
from awq.quantize import forecast

pytest.importorskip(
    "transformers.core_model_loading", reason="transformers has no loading by parts before 5"
)


def bytes_in(folder):
    files = folder.glob("*.safetensors")
    return sum(tensor.nbytes for path in files for tensor in load_file(path).values())


@pytest.mark.parametrize("kind", ["tied", "mixture", "tower"])
def test_linears_and_sizes(kind, tmp_path):
    source = saved(KINDS[kind][0](), tmp_path / "source")
    plan = plan_quantization(source, tmp_path / "out", SETTINGS)
    report = quantize_directory(source, tmp_path / "out", SETTINGS, IDS, preset="fast")
    assert plan.linears == sorted(line.name for line in report.linears)
    assert plan.skipped == report.skipped
    assert plan.bytes_before == bytes_in(source)
    assert plan.bytes_after == bytes_in(tmp_path / "out")


def test_by_its_command(llama_dir, capsys):
    assert main(["quantize", str(llama_dir), "--dry-run", "--group-size", "16", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["linears"]) == 21 and plan["skipped"] == {
        "lm_head": "outside the repeated blocks"
    }
    assert plan["parallel"].startswith("tensor parallelism up to")
    assert main(["quantize", str(llama_dir), "--dry-run", "--group-size", "16"]) == 0
    assert "21 linears to quantize, 1 left as they are" in capsys.readouterr().out


def test_bad_settings_are_refused_before_the_work(llama_dir, tmp_path):
    with pytest.raises(ConfigError, match="not a multiple of group_size"):
        plan_quantization(llama_dir, quant_config={"q_group_size": 128})
    with pytest.raises(ConfigError, match="is no module of the model"):
        plan_quantization(llama_dir, quant_config={**SETTINGS, "modules_to_not_convert": ["mpl"]})


def test_a_disk_that_is_too_small(tmp_path):
    with pytest.raises(CheckpointError, match=r"GB are missing"):
        forecast.check_disk(tmp_path / "a" / "b", 10**18)
    forecast.check_disk(tmp_path / "a" / "b", 1)


def test_a_run_asks_the_disk_before_its_work(llama_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"disk are needed.*GB are missing"):
        quantize_directory(llama_dir, tmp_path / "out", SETTINGS, IDS)
    with pytest.raises(CheckpointError, match=r"GB are missing"):
        plan_quantization(llama_dir, tmp_path / "out", SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_memory_that_is_too_small(llama_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "available_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"GB of memory are needed.*GB are missing"):
        plan_quantization(llama_dir, quant_config=SETTINGS)
    with pytest.raises(ConfigError, match=r"GB are missing"):
        quantize_directory(llama_dir, tmp_path / "out", SETTINGS, IDS)


def test_processes_of_one_machine_share_its_memory(llama_dir, monkeypatch):
    # enough for one process and CUDA's libraries, and no more than kilobytes for each of many
    monkeypatch.setattr(forecast, "available_memory", lambda: 4 * 10**9)
    plan_quantization(llama_dir, quant_config=SETTINGS)
    monkeypatch.setattr(forecast, "present_team", lambda: Team(1, 10**6, 10**6))
    with pytest.raises(ConfigError, match=r"GB are missing"):
        plan_quantization(llama_dir, quant_config=SETTINGS)


def test_activations_that_find_no_room_in_memory_lie_on_the_disk(llama_dir, tmp_path, monkeypatch):
    quantize_directory(llama_dir, tmp_path / "memory", SETTINGS, IDS)
    written = []

    def without_room(needed):
        return needed.on_disk(0)

    monkeypatch.setattr(forecast, "check_memory", without_room)
    new_file = Room.new_file
    monkeypatch.setattr(
        Room, "new_file", lambda room: written.append(new_file(room)) or written[-1]
    )
    quantize_directory(llama_dir, tmp_path / "disk", SETTINGS, IDS)
    assert len(written) > 3 and not any(path.exists() for path in written)
    assert same(tmp_path / "memory", tmp_path / "disk")


def peak_of_a_run(source, output, options):
    """Resident bytes at the peak of a process that quantizes, by the kernel, and as it planned."""
    script = textwrap.dedent(
        """
        import json, sys
        import torch
        from pathlib import Path
        from awq import quantize_directory
        from awq.quantize import forecast, pipeline

        planned, check = [], forecast.check_memory
        forecast.check_memory = lambda needed: planned.append(needed.ram) or check(needed)
        source, output, options = sys.argv[1:]
        ids = torch.randint(3, 60, (4, 64), generator=torch.Generator().manual_seed(1))
        quantize_directory(source, output, {"q_group_size": 64}, ids, **json.loads(options))
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        print(json.dumps([peak * 1024, *planned]))
        """
    )
    command = [sys.executable, "-c", script, str(source), str(output), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux: /proc")
@pytest.mark.parametrize(
    "sizes, options",
    [
        # most of it is Python and torch
        (dict(hidden_size=128, intermediate_size=256), {}),
        # a fifth of it is Gram matrices and the weights of a block
        (dict(hidden_size=1024, intermediate_size=4096), dict(preset="fast", clip=False)),
    ],
)
def test_the_planned_peak_is_the_real_one(sizes, options, tmp_path):
    shape = dict(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=500)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **shape)).bfloat16()
    saved(model, tmp_path / "source")
    given = {**options, "scaling": False, "progress": False}
    peak, planned = peak_of_a_run(tmp_path / "source", tmp_path / "out", given)
    assert abs(peak - planned) <= 0.1 * peak, (peak, planned)
