"""What quantization cost, as rows of a table: the same on the model card and the report's page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

Row = tuple[str, str, str]


def recovery_rows(found: Mapping[str, Any]) -> list[Row]:
    """(figure, the original's, the quantized model's) of an evaluation's `to_dict()`: a
    `Divergence`, several by the name of their text, or an `EmbeddingDrift`."""
    if "texts" in found and isinstance(found["texts"], Mapping):
        names = without_folders(found["texts"])
        rows: list[Row] = []
        for path, figures in found["texts"].items():
            of_text = recovery_rows(figures)
            rows += [(f"{names[path]}: {figure}", old, new) for figure, old, new in of_text]
        return rows

    if "perplexity_before" in found:
        return _of_language(found)
    return _of_embeddings(found)


def divergence_by_text(found: Mapping[str, Any]) -> dict[str, float]:
    """Name of a text → mean KL divergence in nats, where several were measured."""
    texts = found.get("texts")
    if not isinstance(texts, Mapping):
        return {}
    names = without_folders(texts)
    return {names[path]: float(figures["mean_kl"]) for path, figures in texts.items()}


def without_folders(paths: Iterable[str]) -> dict[str, str]:
    """Path of a text → its file's name, for readers have other folders; the path where several
    files have that name."""
    names = {path: path.replace("\\", "/").rpartition("/")[2] or path for path in paths}
    count = Counter(names.values())
    return {path: name if count[name] == 1 else path for path, name in names.items()}


def _of_language(found: Mapping[str, Any]) -> list[Row]:
    before = found["perplexity_before"]
    after = found["perplexity_after"]
    return [
        ("perplexity", f"{before:.3f}", f"{after:.3f}"),
        ("recovery (perplexity of the original ÷ quantized)", "", f"{100 * before / after:.1f} %"),
        ("KL divergence, nats a token", "0", _with_interval(found, "mean_kl", "kl_interval")),
        ("same most likely token", "100 %", f"{100 * found['top1_agreement']:.2f} %"),
    ]


def _with_interval(found: Mapping[str, Any], name: str, interval: str) -> str:
    """A figure, and its 95 % interval where there is one."""
    value = f"{found[name]:.4f}"
    if not found.get(interval):
        return value
    low, high = found[interval]
    return f"{value} (95 %: {low:.4f}–{high:.4f})"


def _of_embeddings(found: Mapping[str, Any]) -> list[Row]:
    rows = [
        ("cosine to the original's embeddings, mean", "1", f"{found['mean_cosine']:.4f}"),
        (f"… least of {found['texts']} texts", "1", f"{found['min_cosine']:.4f}"),
        ("neighbours that stay, of 10", "10", f"{10 * found['neighbour_overlap']:.2f}"),
    ]
    for key, label in (("spearman", "Spearman ×100, sentence pairs"), ("ndcg", "nDCG@10")):
        if found.get(f"{key}_before") is not None:
            before = found[f"{key}_before"]
            after = found[f"{key}_after"]
            rows.append((label, f"{before:.4g}", f"{after:.4g}"))
    return rows
