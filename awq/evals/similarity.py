"""Embeddings before and after quantization: cosine drift, rank correlation on sentence pairs,
neighbours, small retrieval.

Cosine drift and neighbour overlap are the sensitive figures: Spearman on sentence pairs hardly
moves in 4 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES_AT_ONCE = 1024  # rows of cosines that are held at a time


class Embedder(Protocol):
    """`awq.Encoder`, `SentenceTransformer`, or anything else with their `encode`."""

    def encode(self, texts: list[str], /, *, batch_size: int = ...) -> Any: ...


def embeddings_of(
    model: Embedder,
    texts: Sequence[str],
    batch_size: int = 32,
    **kwargs: Any,
) -> Tensor:
    """float32 [texts, features] on the CPU from any `encode`; kwargs (prompt_name …) go to it."""
    if not texts:
        raise ValueError("no texts to embed.")
    return torch.as_tensor(model.encode(list(texts), batch_size=batch_size, **kwargs)).float().cpu()


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
    """Scores, first and second sentences of a TSV file with lines
    `score<TAB>sentence<TAB>sentence`."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rows = [line.split("\t") for line in lines if line.count("\t") >= 2]
    return [float(r[0]) for r in rows], [r[1] for r in rows], [r[2] for r in rows]


def pair_spearman(embeddings_a: Tensor, embeddings_b: Tensor, scores: Sequence[float]) -> float:
    """Spearman correlation of pairwise cosine with human scores, times 100 as is usual."""
    return 100 * spearman(F.cosine_similarity(embeddings_a, embeddings_b, dim=-1), scores)


def neighbour_overlap(before: Tensor, after: Tensor, k: int = 10) -> float:
    """Mean share of each text's k nearest other texts (by cosine) that stay its nearest; 1 means
    the same neighbours.

    before, after: [texts, features] of the same texts; k is cut to the number of other texts.
    """
    count = len(before)
    if count != len(after) or count < 2 or k < 1:
        raise ValueError(
            f"neighbours of {count} and {len(after)} texts with k {k}: give at least 2 texts, the "
            "same for both."
        )

    k = min(k, count - 1)
    first, second = (_nearest(e, e, k, leave_out_self=True) for e in (before, after))

    return float((first.unsqueeze(2) == second.unsqueeze(1)).any(2).double().mean())


def ndcg(queries: Tensor, documents: Tensor, relevant: Sequence[int], k: int = 10) -> float:
    """nDCG@k in [0, 1] with one relevant document per query: 1 / log2(1 + rank), or 0 beyond rank
    k.

    queries [queries, features], documents [documents, features]; relevant: index of each query's
    document.
    """
    if len(relevant) != len(queries):
        raise ValueError(f"{len(relevant)} relevant documents for {len(queries)} queries.")

    found = _nearest(queries, documents, min(k, len(documents)))
    gains = 1 / torch.arange(2, found.shape[1] + 2, dtype=torch.float64).log2()
    hits = found == torch.as_tensor(list(relevant)).unsqueeze(1)

    return float((hits.double() @ gains).mean())


def _nearest(queries: Tensor, documents: Tensor, k: int, leave_out_self: bool = False) -> Tensor:
    """Indices [queries, k] of the nearest documents by cosine."""
    documents = F.normalize(documents.float(), dim=-1)
    found = []
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        some = queries[start : start + QUERIES_AT_ONCE]
        cosine = F.normalize(some.float(), dim=-1) @ documents.t()
        if leave_out_self:
            row = torch.arange(len(cosine))
            cosine[row, start + row] = -torch.inf

        found.append(cosine.topk(k, dim=1).indices)

    return torch.cat(found)


@dataclass(frozen=True)
class EmbeddingDrift:
    """Figures of one model before and after quantization, on texts that were not calibrated on.

    neighbour_overlap, ndcg_…: at 10. spearman_…: times 100; they and ndcg_… are None when no pairs
    were given.
    """

    texts: int
    mean_cosine: float
    min_cosine: float
    neighbour_overlap: float
    spearman_before: float | None = None
    spearman_after: float | None = None
    ndcg_before: float | None = None
    ndcg_after: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        """One or two lines for a terminal or a model card."""
        lines = [
            f"cosine to full precision on {self.texts} texts: mean {self.mean_cosine:.4f}, least "
            f"{self.min_cosine:.4f}; "
            f"neighbour overlap@10 {self.neighbour_overlap:.3f}"
        ]
        if self.spearman_before is not None:
            lines.append(
                f"sentence pairs, Spearman ×100: {self.spearman_before:.2f} before, "
                f"{self.spearman_after:.2f} after"
            )

        if self.ndcg_before is not None:
            lines.append(
                f"retrieval, nDCG@10: {self.ndcg_before:.4f} before, {self.ndcg_after:.4f} after"
            )

        return "\n".join(lines)


def judge(
    before: Tensor,
    after: Tensor,
    pairs: tuple[Sequence[float], Sequence[str], Sequence[str]] | None = None,
    relevant: float = 4.0,
) -> EmbeddingDrift:
    """Compares embeddings [texts, features] of the same texts before and after quantization.

    pairs: (scores, first, second) as `read_pairs` gives them, when the texts are `first + second`.
    Its pairs with a score of at least `relevant` make the retrieval set: the first sentence asks,
    its partner among all second sentences is the answer. Raises ValueError when the numbers of
    texts do not fit.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"embeddings of shape {tuple(before.shape)} and {tuple(after.shape)} are not of the "
            "same texts."
        )

    cosine = F.cosine_similarity(before.float(), after.float(), dim=-1)
    figures: dict[str, float] = {}
    if pairs is not None:
        scores = list(pairs[0])
        count = len(pairs[0])
        if len(before) != 2 * count:
            raise ValueError(
                f"{len(before)} embeddings for {count} pairs; embed the first sentences, then the "
                "second ones."
            )

        asked = [i for i, score in enumerate(scores) if score >= relevant]
        for name, e in (("before", before), ("after", after)):
            figures[f"spearman_{name}"] = pair_spearman(e[:count], e[count:], scores)
            if asked:
                figures[f"ndcg_{name}"] = ndcg(e[:count][asked], e[count:], asked)

    overlap = neighbour_overlap(before, after)
    return EmbeddingDrift(
        len(before), float(cosine.mean()), float(cosine.min()), overlap, **figures
    )
