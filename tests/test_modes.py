"""Modes of torch that the caller is in: default dtypes, autocast and inference mode change no bit
of what is quantized, generated and embedded."""

from contextlib import contextmanager

import pytest
import torch
from conftest import make_tokenizer

from awq import AutoAWQForCausalLM, Encoder
from awq.errors import ModelError
from awq.models.base import BaseAWQForCausalLM
from awq.nn.modes import ordinary_arithmetic

IDS = torch.arange(4, 16).view(2, 6)
ROWS = torch.randint(4, 60, (8, 16), generator=torch.Generator().manual_seed(0))


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def quantized(folder):
    model = AutoAWQForCausalLM.from_pretrained(str(folder))
    model.fuse_layers(64)
    settings = {"quant_config": {"q_group_size": 16}, "preset": "balanced", "progress": False}
    model.quantize(ROWS, general_texts=False, **settings)
    return model


def work(llama_dir, bert_dir):
    """(a quantized model, its tensors, tokens that it generates, embeddings)."""
    model = quantized(llama_dir)
    tensors = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    tokens = model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert str(model.fusion) == "fused"
    encoder = Encoder.from_pretrained(bert_dir, device="cpu")
    return model, tensors, tokens, encoder.encode(["the cat", "a dog under the old tree"])


@pytest.fixture(scope="module")
def expected(llama_dir, bert_dir):
    make_tokenizer().save_pretrained(bert_dir)
    return work(llama_dir, bert_dir)


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_the_caller_change_nothing(llama_dir, bert_dir, expected, mode):
    with MODES[mode]():
        model, tensors, tokens, embeddings = work(llama_dir, bert_dir)
    for name, tensor in expected[1].items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
    assert torch.equal(tokens, expected[2]) and torch.equal(embeddings, expected[3])
    start = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=start, labels=IDS).loss.backward()
    assert start.grad.isfinite().all() and start.grad.any()


def test_parameters_made_in_inference_mode_are_refused(llama_dir):
    import zoo

    with torch.inference_mode():
        model = BaseAWQForCausalLM(zoo.tiny_model("llama"), str(llama_dir))
    with pytest.raises(ModelError, match=r"made in inference mode.*load the model outside"):
        model.quantize(ROWS, quant_config={"q_group_size": 16}, preset="fast")


def test_ordinary_arithmetic_leaves_the_callers_modes():
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        with ordinary_arithmetic():
            assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    with ordinary_arithmetic():
        assert torch.is_grad_enabled()
