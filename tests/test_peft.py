"""LoRA adapters of PEFT on quantized models: they train, come back exactly, and say what to do
about merging."""

import subprocess
import sys

import pytest
import torch
import transformers.integrations.peft
import zoo
from packaging import version
from transformers import AutoModel, AutoModelForCausalLM

from awq.errors import ModelError
from awq.nn.linear import WQLinear

peft = pytest.importorskip("peft", reason="PEFT is not installed")


@pytest.fixture(scope="module")
def quantized(llama_dir, bert_dir, texts, tmp_path_factory):
    """{auto class: directory} of a tiny quantized decoder and encoder."""
    from awq import AutoAWQForCausalLM

    root, made = tmp_path_factory.mktemp("peft"), {}
    for auto_class, source in ((AutoModelForCausalLM, llama_dir), (AutoModel, bert_dir)):
        model = AutoAWQForCausalLM.from_pretrained(str(source))
        model.quantize(calib_data=texts, quant_config={"q_group_size": 16}, preset="fast")
        made[auto_class] = str(root / auto_class.__name__)
        model.save_quantized(made[auto_class])
    return made


def loss_of(model, batch):
    """Cross entropy of a decoder; of an encoder, the distance of its hidden states from constant
    ones."""
    if model.get_base_model().get_output_embeddings() is not None:
        return model(**batch, labels=batch["input_ids"]).loss
    return (model(**batch).last_hidden_state - 1).square().mean()


def adapted(directory, auto_class, **settings):
    config = peft.LoraConfig(r=4, lora_alpha=16, init_lora_weights=True, **settings)
    return peft.get_peft_model(auto_class.from_pretrained(directory), config)


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModel])
def test_an_adapter_trains_and_comes_back(quantized, auto_class, tmp_path):
    torch.manual_seed(0)
    model = adapted(quantized[auto_class], auto_class, target_modules="all-linear")
    linears = [name for name, module in model.named_modules() if isinstance(module, WQLinear)]
    assert linears and all(name.endswith("base_layer") for name in linears)
    batch = zoo.token_batch()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(7):
        loss = loss_of(model, batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(later < earlier for earlier, later in zip(losses, losses[1:])), losses
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        auto_class.from_pretrained(quantized[auto_class]), tmp_path / "adapter"
    ).eval()
    with torch.no_grad():
        assert torch.equal(loss_of(again, batch), loss_of(model, batch))
        with model.disable_adapter():
            plain = auto_class.from_pretrained(quantized[auto_class]).eval()
            assert torch.equal(zoo.outputs(plain, **batch), zoo.outputs(model, **batch))


def test_adapters_by_name_and_through_transformers(quantized):
    directory = quantized[AutoModelForCausalLM]
    model = adapted(
        directory, AutoModelForCausalLM, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    layers = [m for m in model.modules() if type(m).__name__ == "PackedLoraLinear"]
    assert len(layers) == 2 * model.config.num_hidden_layers
    plain = AutoModelForCausalLM.from_pretrained(directory)
    wanted = transformers.integrations.peft.MIN_PEFT_VERSION
    if version.parse(peft.__version__) < version.parse(wanted):  # 5.24 asks for a version to come
        pytest.skip("transformers has no add_adapter for the newest PEFT that there is")
    plain.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    assert any(type(m).__name__ == "PackedLoraLinear" for m in plain.modules())


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_a_fused_model_takes_adapters_and_generates_with_them(quantized, targets):
    """The fused blocks know of no adapter, so the first call after one is added goes through
    transformers' own loop."""
    from awq import AutoAWQForCausalLM

    fused = AutoAWQForCausalLM.from_quantized(quantized[AutoModelForCausalLM], device="cpu")
    call = dict(**zoo.token_batch(), max_new_tokens=6, do_sample=False)
    before = fused.generate(**call)
    assert fused.fusion == "fused"
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(fused.model, config).eval()
    assert torch.equal(fused.generate(**call), before)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0, generator=torch.Generator().manual_seed(0))
    expected = tuned.generate(**call)
    assert torch.equal(fused.generate(**call), expected) and not torch.equal(expected, before)


def test_merging_says_what_to_do_and_that_works(quantized, tmp_path):
    directory, batch = quantized[AutoModelForCausalLM], zoo.token_batch()
    torch.manual_seed(0)
    model = adapted(directory, AutoModelForCausalLM, target_modules=["q_proj", "up_proj"]).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    expected = zoo.outputs(model, **batch)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="dequantize"):
        model.merge_and_unload()
    dense = AutoModelForCausalLM.from_pretrained(directory).dequantize()
    merged = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(zoo.outputs(merged.eval(), **batch), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("first", ["awq.integrations.peft", "peft", "awq"])
def test_whatever_is_imported_first(first):
    """And `import awq` alone imports no PEFT."""
    code = (
        f"import sys, {first}; assert ('peft' in sys.modules) == ({first!r} != 'awq'); "
        "import awq; from peft.tuners.lora import model; "
        "assert model.dispatch_awq.knows_packed_linears"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
