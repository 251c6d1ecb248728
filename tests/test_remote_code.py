"""Models whose code lies beside their weights (`auto_map`): quantized, saved with their code, and
loaded again by the package and by transformers alone."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from awq import AutoAWQForCausalLM
from awq.errors import AwqError
from awq.nn.linear import WQLinear

CONFIGURATION = """
from transformers import PretrainedConfig


class PlainConfig(PretrainedConfig):
    model_type = "plain_remote"

    def __init__(self, hidden_size=64, layers=2, heads=4, vocab_size=64, **more):
        self.hidden_size, self.layers, self.heads = hidden_size, layers, heads
        self.vocab_size, self.num_hidden_layers = vocab_size, layers
        super().__init__(**more)
"""

# Attention of its own, a joined projection, no cache: as code beside weights often is.
MODELING = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_plain import PlainConfig
from .parts_plain import Norm


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.heads = config.heads
        self.norm, self.norm2 = Norm(width), Norm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=True)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden_states, mask=None):
        batch, tokens, width = hidden_states.shape
        qkv = self.qkv(self.norm(hidden_states)).view(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        hidden_states = hidden_states + self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        return hidden_states + self.down(nn.functional.gelu(self.up(self.norm2(hidden_states))))


class PlainModel(PreTrainedModel):
    config_class = PlainConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = Norm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, attention_mask=None, **_):
        tokens = input_ids.shape[1]
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=input_ids.device).tril()
        mask = mask[None, None]
        if attention_mask is not None:
            diagonal = torch.eye(tokens, dtype=torch.bool, device=input_ids.device)
            mask = mask & (attention_mask[:, None, None, :].bool() | diagonal)
        hidden_states = self.embed(input_ids)
        for block in self.blocks:
            hidden_states = block(hidden_states, mask)
        return self.norm(hidden_states)


class PlainForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = PlainConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = PlainModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids=None, attention_mask=None, **_):
        hidden_states = self.model(input_ids, attention_mask)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden_states))
"""

PARTS = """
import torch
from torch import nn


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
"""
FILES = {
    "configuration_plain.py": CONFIGURATION,
    "modeling_plain.py": MODELING,
    "parts_plain.py": PARTS,
}


@pytest.fixture
def dense(tmp_path, monkeypatch):
    """A directory with code, a config and random weights."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "dense"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    config = {
        "architectures": ["PlainForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_plain.PlainConfig",
            "AutoModel": "modeling_plain.PlainModel",
            "AutoModelForCausalLM": "modeling_plain.PlainForCausalLM",
        },
        "model_type": "plain_remote",
        "hidden_size": 64,
        "layers": 2,
        "heads": 4,
        "vocab_size": 64,
        "torch_dtype": "float32",
        "pad_token_id": 0,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(loaded, trust_remote_code=True)
    state = {
        name: (torch.randn_like(t) / t.shape[-1] ** 0.5 if t.dim() > 1 else t + 0.1).contiguous()
        for name, t in model.state_dict().items()
    }
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def ids(rows=16, tokens=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 60, (rows, tokens), generator=generator)


@torch.no_grad()
def test_code_beside_weights(dense, tmp_path):
    """The code goes with the weights; both doors give the logits and tokens of the model in
    memory."""
    wrapper = AutoAWQForCausalLM.from_pretrained(dense, trust_remote_code=True)
    settings = {"q_group_size": 32, "w_bit": 4, "zero_point": True, "version": "GEMM"}
    wrapper.quantize(ids(), quant_config=settings, progress=False)
    assert len(wrapper.report.linears) == 8
    wrapper.save_quantized(tmp_path / "quantized")
    saved = {path.name: path.read_text() for path in (tmp_path / "quantized").glob("*.py")}
    assert saved == FILES
    prompt = {"input_ids": ids(2, 9, 1), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    expected = wrapper.model(**prompt).logits
    call = dict(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    tokens = wrapper.model.generate(**call, use_cache=False)

    ours = AutoAWQForCausalLM.from_quantized(
        tmp_path / "quantized", trust_remote_code=True, device="cpu", max_seq_len=32
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "quantized", trust_remote_code=True
    ).eval()
    for model in (ours.model, theirs):
        assert sum(isinstance(module, WQLinear) for module in model.modules()) == 8
        torch.testing.assert_close(model(**prompt).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.generate(**call, use_cache=False), tokens)
    assert torch.equal(theirs.generate(**call, use_cache=False), tokens)


def test_code_is_not_run_without_leave(dense, tmp_path):
    """One clear line, before any weight is read; nothing of the directory runs."""
    marker = tmp_path / "ran"
    code = (dense / "configuration_plain.py").read_text()
    (dense / "configuration_plain.py").write_text(f"open({str(marker)!r}, 'w')\n{code}")
    for door in (AutoAWQForCausalLM.from_pretrained, AutoAWQForCausalLM.from_quantized):
        with pytest.raises((AwqError, ValueError), match="trust_remote_code") as told:
            door(dense)
        assert "\n" not in str(told.value).strip()
    assert not marker.exists()
