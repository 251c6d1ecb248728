"""Mixtures of experts: experts as linears, packed in one module, under the names of the hub's
checkpoints."""

import json
from inspect import signature

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from awq import AutoAWQForCausalLM
from awq.calibration import CalibrationBatch
from awq.checkpoint import save_checkpoint
from awq.config import AwqConfig
from awq.core.weight import round_to_nearest
from awq.errors import ConfigError
from awq.quantize import QuantizeOptions, quantize_model

pytest.importorskip(
    "transformers.integrations.moe",
    reason="transformers has no experts as 3-D parameters (before 5)",
)
from mixtures import KINDS, SMALL, mixture
from transformers import LlamaConfig, LlamaForCausalLM, Mxfp4Config, conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.integrations.moe import use_experts_implementation

from awq.checkpoint.expert_names import expert_names
from awq.folds.find import find_folds
from awq.nn.block_calls import hidden_of
from awq.nn.capture import NothingFromTheHost
from awq.nn.expert_shape import fused_experts
from awq.nn.experts import every_token, named_experts
from awq.nn.expose import conceal_experts, expose_experts
from awq.nn.layout import prepare
from awq.nn.linear import WQLinear
from awq.nn.packed_experts import AwqExperts, pack_experts
from awq.nn.sorted_products import (
    SortedProducts,
    conceal_sorted,
    expose_sorted,
    sorted_products,
)
from awq.nn.surgery import replace_module
from awq.quantize.statistics import MaskHolder, collect_inputs

pytestmark = pytest.mark.skipif(
    "has_gate" not in signature(use_experts_implementation).parameters,
    reason="transformers has no experts that say their form (before 5.3)",
)

NAMES = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.3.w1",
    "qwen3_moe": "model.layers.0.mlp.experts.3.gate_proj",
    "qwen2_moe": "model.layers.0.mlp.experts.3.gate_proj",
    "gpt_oss": "model.layers.0.mlp.experts.3.gate_proj",
}
CONFIG = AwqConfig(group_size=32)


def ids_of(seed, rows=4, tokens=48):
    return torch.randint(1, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def batch_of(seed):
    ids = ids_of(seed)
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    return CalibrationBatch(ids, mask)


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@pytest.mark.parametrize("kind", KINDS)
def test_experts_as_linears_compute_the_same_and_go_back_bit_for_bit(kind):
    model, ids = mixture(kind), ids_of(1)
    before, expected = (
        {name: t.clone() for name, t in model.state_dict().items()},
        logits(model, ids),
    )
    assert fused_experts(model)
    assert not expose_experts(model, expert_names(model))
    assert len(named_experts(model)) == 2
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    with every_token(model):
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    conceal_experts(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", KINDS)
def test_router_and_all_experts_take_part_in_the_fold_of_their_norm(kind):
    model = mixture(kind)
    expose_experts(model)
    with every_token(model):
        (_, groups), *_ = find_folds(model)
    shared = next(g for g in groups if g.fold and any("experts.0." in name for name in g.consumers))
    inside = [name for name in shared.consumers if ".experts." in name]
    assert len(inside) == 8  # gate and up of four experts
    routers = [name for name in shared.consumers if name in ("mlp.gate", "mlp.router")]
    assert len(routers) == 1
    downs = [
        g
        for g in groups
        if any(name.endswith("down_proj") and ".experts." in name for name in g.consumers)
    ]
    assert len(downs) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_saved_and_loaded_through_both_doors(kind, tmp_path):
    model, ids = mixture(kind), ids_of(2)
    report = quantize_model(model, [batch_of(3)], CONFIG)
    assert all(line.loss <= line.loss_rtn for line in report.linears)
    assert all(
        sum(tokens.routed) == 2 * int(batch_of(3).attention_mask.sum())
        for tokens in report.experts.values()
    )
    assert not fused_experts(model)
    expected = logits(model, ids)
    save_checkpoint(model, tmp_path / "a", CONFIG, report)
    tensors = load_file(tmp_path / "a/model.safetensors")
    assert f"{NAMES[kind]}.qweight" in tensors
    assert not [name for name, tensor in tensors.items() if tensor.dim() == 3]
    settings = json.loads((tmp_path / "a/config.json").read_text())["quantization_config"]
    router = NAMES[kind].split(".experts")[0] + (".router" if kind == "gpt_oss" else ".gate")
    assert router in settings["modules_to_not_convert"]
    ours = AutoAWQForCausalLM.from_quantized(
        str(tmp_path / "a"), torch_dtype="float32", device="cpu"
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert torch.equal(logits(ours.model, ids), expected)
    assert torch.equal(logits(theirs, ids), expected)
    assert sum(isinstance(module, AwqExperts) for module in theirs.modules()) == 2
    save_checkpoint(theirs, tmp_path / "b", CONFIG)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (
        tmp_path / "b/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_fused_generation_gives_the_tokens_of_transformers_own_loop(kind, tmp_path):
    model, ids = mixture(kind), ids_of(6, rows=2, tokens=10)
    quantize_model(model, [batch_of(3)], CONFIG, QuantizeOptions(preset="fast"))
    save_checkpoint(model, tmp_path, CONFIG)
    ours = AutoAWQForCausalLM.from_quantized(str(tmp_path), torch_dtype="float32", device="cpu")
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert torch.equal(ours.generate(ids, **settings), model.generate(ids, **settings))
    assert ours.fusion.state == "fused"


@pytest.mark.parametrize("kind", KINDS)
def test_routing_never_asks_the_device_for_a_number(kind):
    """What a CUDA graph of a decode step needs; tensors without data have no numbers to give."""
    model = mixture(kind)
    quantize_model(model, [batch_of(3)], CONFIG, QuantizeOptions(preset="fast"))
    prepare(model, torch.float32)
    routed = model.model.layers[0].mlp
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), NothingFromTheHost():
        y = hidden_of(routed(torch.empty(8, 1, 64)))
    assert y.shape == (8, 1, 64)


def test_packed_experts_load_their_own_state_dict():
    first, second, ids = mixture("mixtral", 0), mixture("mixtral", 1), ids_of(4)
    for model in (first, second):
        quantize_model(model, [batch_of(5)], CONFIG)
    second.load_state_dict(first.state_dict())
    assert torch.equal(logits(second, ids), logits(first, ids))


@pytest.mark.parametrize("few, many", [(4, 12)])
def test_discovery_runs_a_block_as_often_as_it_has_experts(few, many):
    """And not as often as there are pairs of experts: mixtures have hundreds."""
    counts = []
    for experts in (few, many):
        config = AutoConfig.for_model("mixtral", **SMALL, num_local_experts=experts)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        expose_experts(model)
        runs = []
        for block in model.model.layers:
            block.register_forward_pre_hook(lambda *_: runs.append(1))
        with every_token(model):
            groups = next(iter(find_folds(model)))[1]
        assert sum(g.fold is not None for g in groups if "down" in g.consumers[0]) == experts
        counts.append(len(runs))
    assert counts[1] - counts[0] <= 1.5 * (many - few) / few * counts[0]


class SortedExperts(torch.nn.Module):
    """Llama 4's form: each expert has a row for every token, zero where the token is not routed to
    it."""

    def __init__(self, experts=4, hidden=64, inner=32):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(experts, hidden, 2 * inner) / 8)
        self.down_proj = torch.nn.Parameter(torch.randn(experts, inner, hidden) / 6)
        self.act_fn = torch.nn.SiLU()

    def forward(self, hidden_states):
        rows = hidden_states.view(len(self.down_proj), -1, hidden_states.shape[-1])
        gate, up = torch.bmm(rows, self.gate_up_proj).chunk(2, -1)
        return torch.bmm(up * self.act_fn(gate), self.down_proj).flatten(0, 1)


class SomeIdentities(torch.nn.Module):
    """LongCat's form: experts from number 3 on have no weights and hand tokens on."""

    def __init__(self, experts=3, identities=2, hidden=64, inner=32):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(
            torch.randn(experts + identities, 2 * inner, hidden) / 8
        )
        self.down_proj = torch.nn.Parameter(torch.randn(experts, hidden, inner) / 6)
        self.act_fn = torch.nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for token, (chosen, weights) in enumerate(zip(top_k_index, top_k_weights)):
            for number, weight in zip(chosen, weights):
                x = hidden_states[token]
                if number < len(self.down_proj):
                    gate, up = (self.gate_up_proj[number] @ x).chunk(2)
                    x = self.down_proj[number] @ (self.act_fn(gate) * up)
                output[token] += weight * x
        return output


class Inner(torch.nn.Module):
    """What DBRX's experts hold their weights in."""

    def __init__(self, rows, hidden):
        super().__init__()
        self.w1, self.v1, self.w2 = (
            torch.nn.Parameter(torch.randn(rows, hidden) / 8) for _ in range(3)
        )
        self.activation_fn = torch.nn.SiLU()


class ThreeStacks(torch.nn.Module):
    """DBRX's form: gate, up and the transposed down of all experts one below the other."""

    def __init__(self, experts=4, hidden=64, inner=32):
        super().__init__()
        self.num_experts, self.mlp = experts, Inner(experts * inner, hidden)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        x, output = hidden_states.flatten(0, -2), torch.zeros_like(hidden_states).flatten(0, -2)
        parts = (stack.chunk(self.num_experts) for stack in self.mlp.parameters())
        for number, (gate, up, down) in enumerate(zip(*parts)):
            share = (top_k_weights * (top_k_index == number)).sum(-1, keepdim=True)
            output += share * ((self.mlp.activation_fn(x @ gate.T) * (x @ up.T)) @ down)
        return output.view(len(hidden_states), -1, hidden_states.shape[-1])


@torch.no_grad()
@pytest.mark.parametrize("kind", [SortedExperts, SomeIdentities, ThreeStacks])
def test_experts_without_the_flags_of_the_contract(kind):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"experts": kind()})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = (torch.randn(24, 64),)
    if kind is SomeIdentities:
        arguments = (torch.randn(6, 64), torch.rand(6, 5).argsort(-1)[:, :2], torch.rand(6, 2))
    if kind is ThreeStacks:
        arguments = (torch.randn(2, 3, 64), torch.rand(6, 4).argsort(-1)[:, :2], torch.rand(6, 2))
    expected = model["experts"](*arguments)
    assert expose_experts(model) == {} and len(named_experts(model)) == 1
    torch.testing.assert_close(model["experts"](*arguments), expected, rtol=1e-4, atol=1e-5)
    with every_token(model):
        torch.testing.assert_close(model["experts"](*arguments), expected, rtol=1e-4, atol=1e-5)
    conceal_experts(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    expose_experts(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            weight = round_to_nearest(module.weight.data, 32)
            module.weight.data = weight.dequantize(torch.float32)
            replace_module(model, name, WQLinear.from_quantized(weight, None, dtype=torch.float32))
    assert pack_experts(model) == 1
    dense = model["experts"].dequantized(torch.float32)
    torch.testing.assert_close(
        model["experts"](*arguments), dense(*arguments), rtol=1e-4, atol=1e-5
    )


class Einsum(torch.nn.Module):
    """Experts in a form of their own: all of them see every token."""

    def __init__(self, experts=4, hidden=64):
        super().__init__()
        self.router = torch.nn.Linear(hidden, experts, bias=False)
        self.matrices = torch.nn.Parameter(torch.randn(experts, hidden, hidden) / 8)

    def forward(self, x):
        return torch.einsum("bte,btd,edf->btf", self.router(x).softmax(-1), x, self.matrices)


def test_experts_in_an_unknown_form_are_named_with_their_share():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).float().eval()
    for layer in model.model.layers:
        layer.mlp = Einsum()
    report = quantize_model(model, [batch_of(3)], CONFIG, QuantizeOptions(preset="fast"))
    [warning] = [text for text in report.warnings if "Einsum" in text]
    share = float(warning.split("%")[0]) / 100
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    dense = sum(p.numel() for name, p in model.model.layers.named_parameters() if p.dim() == 3)
    quantized = sum(line.shape[0] * line.shape[1] for line in report.linears)
    assert share == pytest.approx(dense / (blocks + quantized), abs=1e-3)
    assert "model.layers.1.mlp" in report.skipped and warning in report.summary()


def jetmoe():
    """A tiny random one: each product of its experts is a module with a 3-D weight."""
    config = AutoConfig.for_model(
        "jetmoe",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=16,
        vocab_size=128,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        parameter.data *= 1 if "embed" in name or parameter.dim() == 1 else 4
    return model


def test_products_of_sorted_rows_are_quantized_and_load_through_both_doors(tmp_path):
    model, ids = jetmoe(), ids_of(2)
    before = logits(model, ids)
    names = set(sorted_products(model))
    assert len(names) == 8  # two of each layer's attention, two of its MLP
    expose_sorted(model)
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-4)
    conceal_sorted(model)
    assert set(sorted_products(model)) == names and torch.equal(logits(model, ids), before)
    report = quantize_model(model, [batch_of(3)], CONFIG)
    assert {line.name.rpartition(".")[0] for line in report.linears} >= names
    assert not [line.name for line in report.linears if "router" in line.name]
    expected = logits(model, ids)
    save_checkpoint(model, tmp_path / "a", CONFIG, report)
    tensors = load_file(tmp_path / "a/model.safetensors")
    assert "model.layers.1.mlp.input_linear.3.qweight" in tensors
    assert not [name for name, tensor in tensors.items() if tensor.dim() == 3]
    ours = AutoAWQForCausalLM.from_quantized(
        str(tmp_path / "a"), torch_dtype="float32", device="cpu"
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert torch.equal(logits(ours.model, ids), expected)
    assert torch.equal(logits(theirs, ids), expected)
    dense = theirs.dequantize()
    assert set(sorted_products(dense)) == names
    torch.testing.assert_close(logits(dense, ids), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_counts_in_no_statistic_of_sorted_rows():
    model, batch, holder = jetmoe(), batch_of(3), MaskHolder()
    expose_sorted(model)
    holder.mask = batch.attention_mask.bool()
    names = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    banks = [name for name, m in model.named_modules() if isinstance(m, SortedProducts)]
    with collect_inputs(model, names, holder) as statistics:
        model(**batch.model_inputs())
    real = int(batch.attention_mask.sum())
    for bank in banks:
        found = [own.tokens for name, own in statistics.items() if name.startswith(f"{bank}.")]
        assert sum(found) == 2 * real
    assert len(banks) == 8 and statistics["model.layers.0.mlp.router.layer"].tokens == real


def stored_in_mxfp4(directory):
    """A tiny GPT-OSS whose experts are stored as in the hub's checkpoints: pairs of 4-bit floats, a
    scale for each 32."""
    model = mixture("gpt_oss")
    model.save_pretrained(directory, save_original_format=False)
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(
            0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8
        )
        tensors[f"{name}_scales"] = torch.randint(
            120, 124, (experts, outputs, inputs // 32), dtype=torch.uint8
        )
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    settings = json.loads((directory / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["lm_head"],
    }
    (directory / "config.json").write_text(json.dumps(settings))


def test_what_is_stored_in_mxfp4_is_refused_or_dequantized_first(tmp_path):
    source = tmp_path / "mxfp4"
    stored_in_mxfp4(source)
    with pytest.raises(
        ConfigError, match=r"stored in mxfp4 already.*Mxfp4Config\(dequantize=True\)"
    ):
        AutoAWQForCausalLM.from_pretrained(source)
    wrapper = AutoAWQForCausalLM.from_pretrained(
        source, dtype="bfloat16", quantization_config=Mxfp4Config(dequantize=True)
    )
    report = wrapper.quantize(ids_of(3), quant_config={"q_group_size": 32}, preset="fast")
    assert sum(".experts." in line.name for line in report.linears) == 2 * 4 * 3
    wrapper.save_quantized(tmp_path / "awq")
    loaded = AutoAWQForCausalLM.from_quantized(tmp_path / "awq", device="cpu")
    assert torch.equal(logits(loaded.model, ids_of(4)), logits(wrapper.model, ids_of(4)))


@pytest.fixture
def bare_source():
    """A type whose files hold the weight of a linear under the name of the linear alone, as
    Inkling 2's do."""
    renaming = WeightRenaming(r"mlp\.down_proj", r"mlp.down_proj.weight")
    conversion_mapping.register_checkpoint_conversion_mapping("LlamaForCausalLM", [renaming])
    yield
    del conversion_mapping._checkpoint_conversion_mapping_cache["LlamaForCausalLM"]
    conversion_mapping.USER_REGISTERED_MAPPINGS.discard("LlamaForCausalLM")


def test_a_linear_whose_packed_weight_no_reader_would_find_stays_dense(bare_source, tmp_path):
    """Its packed tensors would be renamed as the bare weight is."""
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    report = quantize_model(model, [batch_of(1)], CONFIG, QuantizeOptions("fast"))
    lost = [name for name in report.skipped if name.endswith("down_proj")]
    assert lost and all("bare tensor" in report.skipped[name] for name in lost)
    assert any(line.name.endswith("up_proj") for line in report.linears)
    save_checkpoint(model, tmp_path / "a", CONFIG, report)
    assert any(
        name.endswith("mlp.down_proj") for name in load_file(tmp_path / "a" / "model.safetensors")
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    ids = ids_of(2)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
