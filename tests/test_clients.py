"""What programs that nobody here wrote ask of this package, each on a tiny model: loaders, servers,
files of other tools."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from transformers import AutoModel, AwqConfig

from awq import AutoAWQForCausalLM
from awq.cli import main
from awq.errors import ConfigError


@pytest.fixture(scope="module")
def quantized(bert_dir, texts, tmp_path_factory):
    """A tiny quantized encoder's directory."""
    model = AutoAWQForCausalLM.from_pretrained(str(bert_dir))
    model.quantize(calib_data=texts, quant_config={"q_group_size": 16}, preset="fast")
    directory = tmp_path_factory.mktemp("clients") / "bert"
    model.save_quantized(str(directory))
    return directory


def test_a_device_map_without_a_dtype(quantized):
    """transformers 4.56 and 4.57 hand accelerate the dtype None unless the quantizer names one."""
    plain, placed = (
        AutoModel.from_pretrained(quantized, **how) for how in ({}, {"device_map": "cpu"})
    )
    inputs = zoo.token_batch()
    assert torch.equal(zoo.outputs(placed, **inputs), zoo.outputs(plain, **inputs))
    assert placed.pooler.dense.weight.dtype.is_floating_point
    AutoModel.from_pretrained(quantized, device_map="auto")


def test_float32_means_float32_without_llvmlite(quantized):
    """A warning says what it costs; a bfloat16 model says nothing."""
    code = f"""
import sys
sys.modules["llvmlite"] = None  # as where it is not installed
import torch, zoo
from transformers import AutoModel
from awq.kernels import use_backend
model = AutoModel.from_pretrained({str(quantized)!r}, torch_dtype=torch.float32)
inputs = zoo.token_batch()
out = zoo.outputs(model, **inputs)
with use_backend("reference"):
    assert torch.allclose(out, zoo.outputs(model, **inputs), atol=1e-6)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "llvmlite" in done.stderr and "slow" in done.stderr


def test_fusing_that_transformers_asks_for_is_not_passed_over_in_silence(quantized, caplog):
    asked = AwqConfig(do_fuse=True, fuse_max_seq_len=32)
    if not hasattr(asked, "do_fuse"):
        pytest.skip("transformers has no do_fuse (since 5)")
    AutoModel.from_pretrained(quantized, quantization_config=asked)
    assert "from_quantized(path, fuse_layers=True)" in caplog.text


PROGRAM = """
from transformers import AutoModel
import sys
print(type(AutoModel.from_pretrained(sys.argv[1]).encoder.layer[0].output.dense).__name__)
"""


def test_programs_that_never_import_awq(quantized, tmp_path):
    """Both recipes of docs/guide.md, on a program that knows nothing of this package."""
    page = (Path(__file__).parent.parent / "docs/guide.md").read_text(encoding="utf-8")
    recipe = re.search(r'run_with_awq = "(.*)"', page).group(1).replace("lm_eval", "program")
    line = re.search(r"\.write\('(.*?)'\)", page).group(1)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/awq-autoload.pth").write_text(line)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    started = f"import site; site.addsitedir({str(tmp_path / 'site')!r}); import runpy; "
    started += "runpy.run_module('program', run_name='__main__', alter_sys=True)"
    for code in (recipe, started):
        done = subprocess.run(
            [sys.executable, "-c", code, str(quantized)],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.stdout.strip() == "WQLinear", done.stderr[-2000:]


def test_settings_of_other_writers(quantized, tmp_path):
    """auto-round adds keys of its own; a directory of another method is named as such, wherever its
    key stands."""
    directory = tmp_path / "m"
    shutil.copytree(quantized, directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= {
        "autoround_version": "0.16.1",
        "iters": 200,
        "provider": "auto-round",
    }
    (directory / "config.json").write_text(json.dumps(config))
    inputs = zoo.token_batch()
    loaded = AutoAWQForCausalLM.from_quantized(str(directory), device="cpu")
    assert torch.equal(
        zoo.outputs(loaded.model, **inputs),
        zoo.outputs(AutoModel.from_pretrained(directory), **inputs),
    )
    assert main(["info", str(directory)]) == 0
    config["quantization_config"] = {
        "config_groups": {},
        "format": "pack-quantized",
        "quant_method": "compressed-tensors",
    }
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="compressed-tensors"):
        AutoAWQForCausalLM.from_quantized(str(directory))
    assert main(["info", str(directory)]) == 2
