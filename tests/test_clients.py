"""What programs that nobody here wrote ask of this package, each on a tiny model: loaders, servers, files of other tools."""

import os
import subprocess
import sys

import pytest
import torch
import zoo
from transformers import AutoModel

from awq import AutoAWQForCausalLM


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
    plain, placed = (AutoModel.from_pretrained(quantized, **how) for how in ({}, {"device_map": "cpu"}))
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "llvmlite" in done.stderr and "slow" in done.stderr
