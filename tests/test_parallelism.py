"""How many GPUs a group size allows."""

from inspect import signature

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from awq.quantize.parallelism import split_inputs, tensor_parallel

# (inner features of an expert, what group sizes 128, 64 and 32 allow)
PUBLISHED = {
    "Qwen3-30B-A3B": (768, (2, 4, 8)),
    "Qwen3-235B-A22B": (1536, (4, 8, 16)),
    "Qwen3-Next": (512, (4, 8, 16)),
    "DeepSeek-V2-Lite": (1408, (1, 2, 4)),
    "DeepSeek-V3": (2048, (16, 16, 16)),
    "Mixtral-8x7B": (14336, (16, 16, 16)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_part_holds_whole_groups_and_no_larger_number_does(name):
    inner, allowed = PUBLISHED[name]
    for group, size in zip((128, 64, 32), allowed):
        found = tensor_parallel({"experts.0.down_proj": inner}, group).size
        assert found == size
        assert inner % (found * group) == 0
        assert found == 16 or inner % (2 * found * group) != 0


def test_finer_groups_are_named_where_they_allow_more():
    found = tensor_parallel({"experts.0.down_proj": 768, "self_attn.o_proj": 4096}, 128)
    assert (found.size, found.limit, found.finer) == (2, "experts.0.down_proj", {64: 4, 32: 8})
    assert str(found).endswith(
        "up to 2 GPUs, by experts.0.down_proj; group size 64 up to 4, group size 32 up to 8"
    )
    assert str(tensor_parallel({"down_proj": 16384}, 128)) == "tensor parallelism up to 16 GPUs"
    assert tensor_parallel({"down_proj": 4096}, -1).size == 1


def test_what_is_split_is_read_off_the_model_built_without_weights():
    moe = pytest.importorskip(
        "transformers.integrations.moe",
        reason="transformers has no experts as 3-D parameters (before 5)",
    )
    if "has_gate" not in signature(moe.use_experts_implementation).parameters:
        pytest.skip("transformers has no experts that say their form (before 5.3)")
    sizes = dict(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=96,
        head_dim=32,
    )
    experts = dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, intermediate_size=96
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("qwen3_moe", **sizes, **experts)
        )
    names = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    } - {"lm_head"}
    found = split_inputs(model, names)
    assert found["model.layers.0.self_attn.o_proj"] == 128
    assert found["model.layers.1.mlp.experts.down_proj"] == 96
    assert not any("q_proj" in name or "k_proj" in name for name in found)
    assert tensor_parallel(found, 32).size == 1
