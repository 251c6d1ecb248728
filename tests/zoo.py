"""Tiny random transformers models of many families. Norm weights and biases are random too: ones
and zeros hide errors."""

from __future__ import annotations

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

TINY = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    vocab_size=64,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GQA = dict(num_key_value_heads=2, head_dim=8)
GPT = dict(n_embd=32, n_head=4, n_layer=3, n_positions=64)
DECODERS: dict[str, dict] = {
    "llama": GQA,
    "mistral": GQA,
    "qwen2": dict(num_key_value_heads=2),
    "qwen3": GQA,
    "gemma": GQA,
    "gemma2": GQA,
    "gemma3_text": GQA | dict(sliding_window=8),
    "phi": dict(hidden_size=64, num_key_value_heads=4),
    "phi3": dict(num_key_value_heads=2),
    "falcon": dict(num_kv_heads=2, new_decoder_architecture=True, alibi=False, ffn_hidden_size=48),
    "gpt_neox": {},
    "gptj": GPT | dict(rotary_dim=8),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    "bloom": dict(n_head=4, n_layer=3),
    "mpt": dict(d_model=32, n_heads=4, n_layers=3, expansion_ratio=2, max_seq_len=64),
    "starcoder2": dict(num_key_value_heads=2),
    "stablelm": dict(num_key_value_heads=2, use_parallel_residual=True),
    "cohere": dict(num_key_value_heads=2),
    "olmo": dict(num_key_value_heads=2),
    "olmo2": dict(num_key_value_heads=2),
    "granite": dict(num_key_value_heads=2),
    "gpt2": GPT,
}
ENCODERS: dict[str, dict] = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "mpnet": {},
    "distilbert": dict(dim=32, n_heads=4, n_layers=3, hidden_dim=48),
    "modernbert": dict(local_attention=16, cls_token_id=1, sep_token_id=2),
    "nomic_bert": {},
}
FAMILIES = [*DECODERS, *ENCODERS]


def available(family: str) -> bool:
    """Whether the installed transformers has this family."""
    try:
        AutoConfig.for_model(family)
    except ValueError:
        return False
    return True


def tiny_model(family: str, seed: int = 0) -> torch.nn.Module:
    """A random float32 model in evaluation mode: a causal language model for decoders, the body for
    encoders."""
    return build(family, {**DECODERS.get(family, {}), **ENCODERS.get(family, {})}, seed)


def build(family: str, settings: dict, seed: int = 0) -> torch.nn.Module:
    """A random model of a model type that need not be listed; settings: entries of its config
    beyond TINY."""
    config = AutoConfig.for_model(family)
    for key, value in {**TINY, **settings}.items():
        setattr(config, key, value)
    if getattr(config, "layer_types", None):
        kinds = config.layer_types
        config.layer_types = (
            (kinds * 3)[:3]
            if len(set(kinds)) == 1
            else [kinds[0], next(k for k in kinds if k != kinds[0]), kinds[0]]
        )
    torch.manual_seed(seed)
    is_encoder = family in ENCODERS or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    auto = AutoModel if is_encoder else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").float().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif "embed" not in name and "wte" not in name:
            parameter.data *= 4
    return model


def outputs(model: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits or last hidden states, whichever the model gives, on the CPU; inputs go to the device
    of the model."""
    device = next(model.parameters()).device
    with torch.no_grad():
        out = model(**{name: tensor.to(device) for name, tensor in inputs.items()})
    return (out.logits if "logits" in out else out.last_hidden_state).cpu()


def assert_same_outputs(
    model: torch.nn.Module, other: torch.nn.Module, **inputs: torch.Tensor
) -> None:
    """Equal bits from two models on one kind of device; float32 sums in another order from two
    kinds."""
    ours, theirs = outputs(model, **inputs), outputs(other, **inputs)
    if next(model.parameters()).device.type == next(other.parameters()).device.type:
        assert torch.equal(ours, theirs)
    else:
        assert (ours - theirs).norm() / theirs.norm() < 1e-5


def token_batch(rows: int = 3, length: int = 12, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 63, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
