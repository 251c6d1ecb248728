"""Evaluations against values worked out by other means."""

import math
from types import SimpleNamespace

import pytest
import torch

from awq.evals.perplexity import perplexity
from awq.evals.similarity import (
    embeddings_of,
    judge,
    mean_cosine,
    ndcg,
    neighbour_overlap,
    pair_spearman,
    read_pairs,
    spearman,
)


class Table:
    """No nn.Module: logits depend on the last token only, so windows can be summed by hand."""

    def __init__(self, vocabulary=11, dtype=torch.float32):
        self.rows = torch.randn(
            vocabulary, vocabulary, generator=torch.Generator().manual_seed(0)
        ).to(dtype)
        self.lengths = []

    def __call__(self, input_ids):
        assert input_ids.dtype == torch.int64 and input_ids.dim() == 2
        self.lengths.append(input_ids.shape[1])
        return SimpleNamespace(logits=self.rows[input_ids])


def by_hand(model, ids, window):
    losses = []
    for start in range(0, len(ids), window):
        part = ids[start : start + window].tolist()
        for now, after in zip(part, part[1:]):
            row = model.rows[now].double()
            losses.append(float(row.exp().sum().log() - row[after]))
    return math.exp(sum(losses) / len(losses))


@pytest.fixture
def ids():
    return torch.randint(0, 11, (50,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("window", [2, 7, 16, 49, 50, 2048])
def test_perplexity_windows(window, ids):
    """16 leaves a partial window, which counts; 7 and 49 leave one token, which predicts
    nothing."""
    model = Table()
    assert perplexity(model, ids, window=window) == pytest.approx(
        by_hand(model, ids, window), rel=1e-5
    )
    assert sum(model.lengths) == 50 - (50 % window == 1)
    assert all(n == window for n in model.lengths[:-1])


def test_perplexity_limit_shape_and_extremes(ids):
    model = Table()
    assert perplexity(model, ids, window=8, limit=20) == perplexity(
        model, ids[:20].unsqueeze(0), window=8
    )
    model.rows = torch.zeros(11, 11)
    assert perplexity(model, ids) == pytest.approx(11.0), "a model that knows nothing"
    model.rows = torch.full((11, 11), -5000.0).fill_diagonal_(5000.0)
    assert perplexity(model, torch.tensor([1, 2, 3])) == math.inf
    model.rows = torch.full((11, 11), math.nan)
    assert math.isnan(perplexity(model, ids))


def test_log_likelihoods_are_float32(ids):
    low = Table(dtype=torch.bfloat16)
    exact = Table()
    exact.rows = low.rows.float()
    assert perplexity(low, ids) == perplexity(exact, ids)


def test_perplexity_of_a_real_model_is_its_own_loss(llama_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_dir).eval()
    ids = torch.randint(4, 60, (24,))
    with torch.no_grad():
        loss = float(model(input_ids=ids[None], labels=ids[None]).loss)
    assert perplexity(model, ids) == pytest.approx(math.exp(loss), rel=1e-4)


def test_perplexity_refuses_what_predicts_nothing(ids):
    with pytest.raises(ValueError, match="at least 2 tokens"):
        perplexity(Table(), ids[:1])
    with pytest.raises(ValueError, match="window"):
        perplexity(Table(), ids, window=1)


def test_spearman():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 900]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5, variances 4.5 and 5
    assert spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    with pytest.raises(ValueError, match="3 with 2"):
        spearman([1, 2, 3], [1, 2])


def test_spearman_is_scipys():
    from scipy import stats

    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randint(0, 9, (200,), generator=generator).double() for _ in range(2))
    assert spearman(a, a + b) == pytest.approx(
        float(stats.spearmanr(a.numpy(), (a + b).numpy()).statistic), abs=1e-12
    )


def test_mean_cosine():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert mean_cosine(a, 3 * a) == pytest.approx(1) and mean_cosine(a, -a) == pytest.approx(-1)
    assert mean_cosine(a, torch.tensor([[1.0, 0.0], [1.0, 0.0]])) == pytest.approx(0.5)


def test_any_encode_will_do(bert_dir):
    from awq import Encoder

    encoder = Encoder.from_pretrained(bert_dir, device="cpu")
    found = embeddings_of(encoder, ("the cat", "fire"), batch_size=1)
    assert torch.equal(found, encoder.encode(["the cat", "fire"], batch_size=1))
    listed = SimpleNamespace(encode=lambda texts, batch_size: [[len(t), batch_size] for t in texts])
    assert embeddings_of(listed, ["ab"], 7).tolist() == [[2.0, 7.0]]
    with pytest.raises(ValueError, match="no texts"):
        embeddings_of(encoder, [])


def test_neighbour_overlap():
    line = torch.tensor([[math.cos(a), math.sin(a)] for a in (0.0, 0.1, 0.3, 0.6, 1.0)])
    assert neighbour_overlap(line, 2 * line, k=2) == 1
    assert neighbour_overlap(line, line.flip(0), k=4) == 1, "all others, whatever their order"
    # nearest one, before: 1 0 1 2 3; with the first two rows swapped: 1 0 0 2 3
    assert neighbour_overlap(line, line[[1, 0, 2, 3, 4]], k=1) == pytest.approx(4 / 5)
    assert neighbour_overlap(line, line, k=99) == 1
    with pytest.raises(ValueError, match="at least 2"):
        neighbour_overlap(line[:1], line[:1])


def test_ndcg():
    documents = torch.eye(4)
    queries = torch.tensor([[4.0, 3, 2, 1], [4, 3, 2, 1], [4, 3, 2, 1]])
    assert ndcg(queries, documents, [0, 0, 0]) == pytest.approx(1)
    assert ndcg(queries, documents, [0, 1, 3]) == pytest.approx(
        (1 + 1 / math.log2(3) + 1 / math.log2(5)) / 3
    )
    assert ndcg(queries, documents, [3, 3, 3], k=3) == 0
    with pytest.raises(ValueError, match="2 relevant documents for 3"):
        ndcg(queries, documents, [0, 1])


def test_judge():
    torch.manual_seed(0)
    before = torch.nn.functional.normalize(torch.randn(40, 16), dim=-1)
    pairs = ([5.0, 4.0, *[0.5] * 18], ["a"] * 20, ["b"] * 20)
    same = judge(before, before, pairs)
    assert (same.texts, same.neighbour_overlap) == (40, 1) and same.min_cosine == pytest.approx(1)
    assert same.spearman_before == same.spearman_after and same.ndcg_before == same.ndcg_after
    assert same.ndcg_before == ndcg(before[:2], before[20:], [0, 1])
    noisy = judge(before, before + 0.2 * torch.randn(40, 16), pairs)
    assert noisy.min_cosine < noisy.mean_cosine < 0.99 and noisy.neighbour_overlap < 1
    assert (
        noisy.spearman_before == same.spearman_before
        and noisy.spearman_after != same.spearman_after
    )
    assert f"{noisy.mean_cosine:.4f}" in noisy.summary() and "Spearman" in noisy.summary()
    assert judge(before, before).spearman_before is None
    with pytest.raises(ValueError, match="20 pairs"):
        judge(before[:30], before[:30], pairs)
    with pytest.raises(ValueError, match="same texts"):
        judge(before, before[:3])


def test_sentence_pairs(tmp_path):
    path = tmp_path / "sts.tsv"
    path.write_text("4.5\tthe cat\tthe dog\n\n0\tone\u2028line\tfire\n", encoding="utf-8")
    scores, first, second = read_pairs(path)
    assert (scores, first, second) == (
        [4.5, 0.0],
        ["the cat", "one\u2028line"],
        ["the dog", "fire"],
    )


def test_pair_spearman_is_in_percent():
    angles = torch.tensor([0.1, 0.5, 1.0, 1.4])
    a, b = torch.tensor([[1.0, 0.0]]).expand(4, 2), torch.stack([angles.cos(), angles.sin()], 1)
    assert pair_spearman(a, b, [5, 4, 2, 0]) == pytest.approx(100)
