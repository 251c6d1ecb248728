"""Text encoders of the shapes that people serve, with random weights: what speed and memory depend
on is all there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import common

WORDS = ("river", "hill", "tree", "stone", "water", "fire", "house", "road")
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
GROUP = 128


class Shape(NamedTuple):
    """type: transformers' name of the architecture; settings: what its configuration changes."""

    type: str
    pooling: str
    settings: dict[str, Any]


_BASE = dict(hidden_size=768, num_attention_heads=12)
_BERT_BASE = _BASE | dict(num_hidden_layers=12, intermediate_size=3072)
_ROBERTA = dict(vocab_size=250002, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5)
_LARGE = dict(
    hidden_size=1024,
    num_attention_heads=16,
    num_hidden_layers=24,
    intermediate_size=4096,
)

SHAPES = {
    "bge-base": Shape("bert", "cls", _BERT_BASE | dict(vocab_size=30522)),
    "multilingual-e5-base": Shape(
        "xlm-roberta", "mean", _BERT_BASE | _ROBERTA | dict(max_position_embeddings=514)
    ),
    "bge-m3": Shape("xlm-roberta", "cls", _LARGE | _ROBERTA | dict(max_position_embeddings=8194)),
    "modernbert-base": Shape(
        "modernbert",
        "cls",
        _BASE | dict(num_hidden_layers=22, intermediate_size=1152, vocab_size=50368),
    ),
    "qwen3-embedding-0.6b": Shape(
        "qwen3",
        "lasttoken",
        dict(
            hidden_size=1024,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            num_hidden_layers=28,
            intermediate_size=3072,
            vocab_size=151669,
            max_position_embeddings=32768,
        ),
    ),
    "embeddinggemma-300m": Shape(
        "gemma3_text",
        "mean",
        dict(
            hidden_size=768,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=256,
            num_hidden_layers=24,
            intermediate_size=1152,
            vocab_size=262144,
            max_position_embeddings=2048,
            sliding_window=512,
            query_pre_attn_scalar=256,
            use_bidirectional_attention=True,
        ),
    ),
}


def texts_of(tokens: int, count: int) -> list[str]:
    """Different texts of `tokens` tokens, the two that a tokenizer of `make_tokenizer` adds
    included."""
    return [
        " ".join(WORDS[(i + j * (1 + i % 7)) % 8] for j in range(tokens - 2)) for i in range(count)
    ]


def make_tokenizer(entries: int) -> Any:
    """Whole words, as many as the model knows, and a special token before and after a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL, *WORDS]
    names += [f"w{i}" for i in range(entries - len(names))]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


def write_dense(config: Any, tokenizer: Any, pooling: str, longest: int, folder: Path) -> None:
    """A sentence-transformers directory with random weights in bfloat16."""
    import torch
    from transformers import AutoModel

    torch.manual_seed(0)
    AutoModel.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    rows = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    mode = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}[pooling]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}))


def write_shape(name: str, folder: Path) -> None:
    """`write_dense` of one of `SHAPES`."""
    from transformers import AutoConfig

    shape = SHAPES[name]
    config = AutoConfig.for_model(shape.type, **shape.settings)
    config.bos_token_id, config.pad_token_id, config.eos_token_id = 0, 1, 2
    write_dense(config, make_tokenizer(config.vocab_size), shape.pooling, 512, folder)


def write_quantized(dense: Path, quantized: Path, texts: list[str], dtype: str) -> None:
    """Rounded to nearest, 4 bits."""
    import awq

    model = awq.AutoAWQForEmbedding.from_pretrained(str(dense), torch_dtype=dtype, device_map="cpu")
    model.quantize(
        texts=texts,
        quant_config={"q_group_size": GROUP},
        evaluate=False,
        general_texts=False,
        **common.ROUND_TO_NEAREST,
    )
    model.save_quantized(str(quantized))
