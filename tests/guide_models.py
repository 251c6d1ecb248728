"""The tokenizer and the tiny models that snippets of the guide and of our pages run on."""

import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from awq.calibration.sources import bundled_texts


def make_tokenizer():
    """Byte-level BPE of 320 ids trained on the bundled text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(bundled_texts(), trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=512,
        # as language models' tokenizers say; transformers 4 would add token types by itself
        model_input_names=["input_ids", "attention_mask"],
        chat_template=template,
    )


def make_models(root, tokenizer, positions=512, encoder_positions=512):
    """{"llama": directory, "bert": directory}: tiny random models whose widths divide by the
    guide's group size."""
    torch.manual_seed(0)
    shape = dict(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    made = {
        "llama": LlamaForCausalLM(
            LlamaConfig(**shape, num_key_value_heads=2, max_position_embeddings=positions)
        ),
        "bert": BertModel(BertConfig(**shape, max_position_embeddings=encoder_positions)),
    }
    for name, model in made.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in made}
