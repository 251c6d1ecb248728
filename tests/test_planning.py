"""What a plan says is what quantizing does."""

import json

import pytest
from safetensors.torch import load_file
from test_streaming import IDS, KINDS, SETTINGS, saved

from awq import plan_quantization, quantize_directory
from awq.cli import main
from awq.errors import CheckpointError, ConfigError
from awq.models import planning

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
        planning._check_disk(tmp_path / "a" / "b", 10**18)
    planning._check_disk(tmp_path / "a" / "b", 1)
