"""Embeddings before and after: mean pooling, cosine drift, and Spearman correlation on sentence pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.evals.perplexity import device_of


@torch.no_grad()
def embed_texts(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 64, max_length: int = 256) -> Tensor:
    """Mean-pooled, L2-normalised embeddings, float32 [texts, features], in the order given."""
    if not texts:
        raise ValueError("no texts to embed.")
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    device = device_of(model)
    out: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        inputs = tokenizer([texts[i] for i in part], padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        inputs = {k: v.to(device) for k, v in inputs.items()}
        hidden = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        pooled = F.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1), dim=-1).cpu()
        for i, row in zip(part, pooled):
            out[i] = row
    return torch.stack(out)


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine of matching rows of two [n, features] tensors: 1 means no drift."""
    return float(F.cosine_similarity(a, b, dim=-1).mean())


def spearman(a: Sequence[float] | Tensor, b: Sequence[float] | Tensor) -> float:
    """Spearman rank correlation in [−1, 1]; ties share their mean rank."""
    if len(a) != len(b):
        raise ValueError(f"rank correlation of {len(a)} with {len(b)} values.")
    x, y = (_ranks(torch.as_tensor(v, dtype=torch.float64)) for v in (a, b))
    return float(F.cosine_similarity(x - x.mean(), y - y.mean(), dim=0))


def _ranks(values: Tensor) -> Tensor:
    _, index, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[index]


def read_pairs(path: str | Path) -> tuple[list[float], list[str], list[str]]:
    """Scores, first and second sentences of a TSV file with lines `score<TAB>sentence<TAB>sentence`."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rows = [line.split("\t") for line in lines if line.count("\t") >= 2]
    return [float(r[0]) for r in rows], [r[1] for r in rows], [r[2] for r in rows]


def pair_spearman(embeddings_a: Tensor, embeddings_b: Tensor, scores: Sequence[float]) -> float:
    """Spearman correlation of pairwise cosine with human scores, times 100 as is usual."""
    return 100 * spearman(F.cosine_similarity(embeddings_a, embeddings_b, dim=-1), scores)
