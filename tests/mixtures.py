"""Tiny random mixtures of experts for the tests."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=128,
    pad_token_id=0,
)
KINDS = {
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16),
    "qwen2_moe": dict(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
    ),
    "gpt_oss": dict(
        num_local_experts=4, num_experts_per_tok=2, head_dim=16, layer_types=["full_attention"] * 2
    ),
}


def mixture(kind, seed=0):
    """A tiny random float32 model whose norms and biases are random too."""
    config = AutoConfig.for_model(kind, **SMALL, **KINDS[kind])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or name.endswith("bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif "embed" not in name:
            parameter.data *= 4
    return model
