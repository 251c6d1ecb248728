"""MTEB through its own package on a quantized SentenceTransformer; skipped where mteb is not
installed."""

import pytest
import torch

from awq import AutoAWQForEmbedding
from awq.evals.similarity import embeddings_of, pair_spearman

pytest.importorskip("mteb", reason="mteb is not installed")


def test_scores_are_those_of_the_embeddings(bert_dir, texts, tmp_path):
    import sentence_transformers as library
    from mteb_scores import LocalPairs, scores
    from test_encoder import sentence_directory

    directory = sentence_directory(bert_dir, tmp_path / "m", normalize=True)
    model = AutoAWQForEmbedding.from_pretrained(str(directory))
    model.quantize(texts=texts, quant_config={"q_group_size": 16})
    model.save_quantized(tmp_path / "q")
    first, second = texts[:30], texts[30:]
    lines = "".join(f"{5 - i % 6}\t{a}\t{b}\n" for i, (a, b) in enumerate(zip(first, second)))
    (tmp_path / "pairs.tsv").write_text(lines)
    found = {}
    for folder in ("m", "q"):
        found[folder] = scores(str(tmp_path / folder), [LocalPairs(tmp_path / "pairs.tsv")])[
            "LocalPairs"
        ]
        a, b = (
            embeddings_of(library.SentenceTransformer(str(tmp_path / folder)), part)
            for part in (first, second)
        )
        assert found[folder] == pytest.approx(
            pair_spearman(a, b, [5 - i % 6 for i in range(30)]) / 100, abs=1e-6
        )
    assert found["m"] != found["q"] and torch.isfinite(torch.tensor(list(found.values()))).all()
