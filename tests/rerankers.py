"""A small cross-encoder trained from scratch in seconds: how many words of the second text are in
the first one?"""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import WORDS, make_tokenizer
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import BertConfig, BertForSequenceClassification

SHAPE = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=64,
    max_position_embeddings=64,
    num_labels=1,
    pad_token_id=0,
    initializer_range=0.1,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
STEPS, ROWS, RATE = 600, 64, 2e-3


def word_pairs(count: int, seed: int) -> tuple[list[str], list[str], torch.Tensor]:
    """First texts of 8 words, second ones of 5 to 8, and the share of the second one's words that
    the first one has."""
    generator = torch.Generator().manual_seed(seed)
    first, second, shares = [], [], []
    for _ in range(count):
        order = torch.randperm(len(WORDS), generator=generator).tolist()
        shared, length = (int(torch.randint(low, 9, (1,), generator=generator)) for low in (0, 5))
        x, y = order[:8], order[:shared] + order[8 : 16 - shared]
        y = [y[i] for i in torch.randperm(8, generator=generator).tolist()][:length]
        first.append(" ".join(WORDS[i] for i in x))
        second.append(" ".join(WORDS[i] for i in y))
        shares.append(len(set(x) & set(y)) / length)
    return first, second, torch.tensor(shares)


def pair_tokenizer():
    """The tests' tokenizer with a template for pairs: the second text has type 1."""
    from tokenizers import processors

    tokenizer = make_tokenizer()
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return tokenizer


def reranker_directory(folder: Path, steps: int = STEPS) -> Path:
    """A BERT cross-encoder with its tokenizer; steps=0 leaves it random."""
    tokenizer = pair_tokenizer()
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SHAPE))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    first, second, labels = word_pairs(100 * ROWS, seed=1)
    inputs = tokenizer(first, second, padding=True, return_tensors="pt")
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 50) * (1 - step / steps)
        rows = torch.randint(0, len(labels), (ROWS,))
        logits = model(**{key: value[rows] for key, value in inputs.items()}).logits[:, 0]
        binary_cross_entropy_with_logits(logits, labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
