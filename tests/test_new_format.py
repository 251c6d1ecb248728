"""A format added as `docs/architecture.md` says: its codec, its name in two places, and its dtype,
which no other has, in a third. All the rest of the package takes it up from there.

halves: a byte holds two inputs of one output, the even one in its low half. qweight uint8 [out,
in/2], qzeros uint8 [out, groups], scales float16 [out, groups].
"""

from collections.abc import Mapping

import pytest
import torch
import zoo
from torch import Tensor
from transformers import AutoModelForCausalLM

import awq.checkpoint.files
import awq.config
import awq.formats
from awq import AutoAWQForCausalLM
from awq.checkpoint import convert_checkpoint
from awq.cli import main
from awq.core.weight import QuantizedWeight
from awq.formats.base import Format, Shapes


def _encode(weight: QuantizedWeight) -> dict[str, Tensor]:
    codes = weight.codes.to(torch.uint8)
    return {
        "qweight": codes[:, 0::2] | (codes[:, 1::2] << 4),
        "qzeros": weight.zeros.to(torch.uint8).contiguous(),
        "scales": weight.scales.contiguous(),
    }


def _decode(
    tensors: Mapping[str, Tensor], in_features: int, out_features: int, group_size: int
) -> QuantizedWeight:
    words = tensors["qweight"]
    codes = torch.stack([words & 15, words >> 4], -1).flatten(1)
    return QuantizedWeight(codes, tensors["scales"], tensors["qzeros"])


def _shapes(in_features: int, out_features: int, group_size: int) -> Shapes:
    groups = in_features // group_size
    return {
        "qweight": ((out_features, in_features // 2), torch.uint8),
        "qzeros": ((out_features, groups), torch.uint8),
        "scales": ((out_features, groups), torch.float16),
    }


def _reason(in_features: int, out_features: int, group_size: int) -> str | None:
    return f"in_features {in_features} is odd" if in_features % 2 else None


def _features(rows: int, columns: int) -> tuple[int, int]:
    return 2 * columns, rows


HALVES = Format("halves", _encode, _decode, _shapes, _reason, _features)


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(awq.config.FORMATS, "halves", ("uint8", "float16"))
    monkeypatch.setitem(awq.formats._FORMATS, "halves", HALVES)
    monkeypatch.setitem(awq.formats._LAYOUTS, "halves", HALVES)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_new_format_is_taken_up_everywhere(added, llama_dir, texts, tmp_path, capsys):
    model = AutoAWQForCausalLM.from_pretrained(str(llama_dir))
    config = {"q_group_size": 16, "version": "halves"}
    model.quantize(calib_data=texts, quant_config=config, preset="fast")
    model.save_quantized(str(tmp_path / "halves"))
    inputs = zoo.token_batch()
    expected = zoo.outputs(model.model, **inputs)

    loaded = AutoAWQForCausalLM.from_quantized(str(tmp_path / "halves"), device="cpu")
    assert torch.equal(zoo.outputs(loaded.model, **inputs), expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "halves")
    assert torch.equal(zoo.outputs(loaded, **inputs), expected)

    convert_checkpoint(tmp_path / "halves", tmp_path / "gemm", "gemm")
    convert_checkpoint(tmp_path / "gemm", tmp_path / "back", "halves")
    assert bytes_of(tmp_path / "back") == bytes_of(tmp_path / "halves")

    capsys.readouterr()
    assert main(["info", str(tmp_path / "halves")]) == 0
    assert "halves" in capsys.readouterr().out
