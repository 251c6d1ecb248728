"""Evaluations against values worked out by other means."""

import math
from types import SimpleNamespace

import pytest
import torch

from awq.evals.perplexity import perplexity
from awq.evals.similarity import embed_texts, mean_cosine, pair_spearman, read_pairs, spearman


class Table:
    """No nn.Module: logits depend on the last token only, so windows can be summed by hand."""

    def __init__(self, vocabulary=11, dtype=torch.float32):
        self.rows = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0)).to(dtype)
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
    """16 leaves a partial window, which counts; 7 and 49 leave one token, which predicts nothing."""
    model = Table()
    assert perplexity(model, ids, window=window) == pytest.approx(by_hand(model, ids, window), rel=1e-5)
    assert sum(model.lengths) == 50 - (50 % window == 1)
    assert all(n == window for n in model.lengths[:-1])


def test_perplexity_limit_shape_and_extremes(ids):
    model = Table()
    assert perplexity(model, ids, window=8, limit=20) == perplexity(model, ids[:20].unsqueeze(0), window=8)
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
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randint(0, 9, (200,), generator=generator).double() for _ in range(2))
    assert spearman(a, a + b) == pytest.approx(float(stats.spearmanr(a.numpy(), (a + b).numpy()).statistic), abs=1e-12)


def test_mean_cosine():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert mean_cosine(a, 3 * a) == pytest.approx(1) and mean_cosine(a, -a) == pytest.approx(-1)
    assert mean_cosine(a, torch.tensor([[1.0, 0.0], [1.0, 0.0]])) == pytest.approx(0.5)


def test_embeddings_are_masked_means_in_the_order_given(bert_dir, tokenizer):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(bert_dir).eval()
    texts = ["the cat", "a dog sleeps under the old tree", "fire", "the quick cat runs over the river"]
    found = embed_texts(model, tokenizer, texts, batch_size=3)
    assert found.dtype == torch.float32 and found.shape == (4, model.config.hidden_size)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(4))
    with torch.no_grad():
        for text, row in zip(texts, found):
            alone = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            torch.testing.assert_close(row, alone / alone.norm(), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="no texts"):
        embed_texts(model, tokenizer, [])


def test_sentence_pairs(tmp_path):
    path = tmp_path / "sts.tsv"
    path.write_text("4.5\tthe cat\tthe dog\n\n0\tone\u2028line\tfire\n", encoding="utf-8")
    scores, first, second = read_pairs(path)
    assert (scores, first, second) == ([4.5, 0.0], ["the cat", "one\u2028line"], ["the dog", "fire"])


def test_pair_spearman_is_in_percent():
    angles = torch.tensor([0.1, 0.5, 1.0, 1.4])
    a, b = torch.tensor([[1.0, 0.0]]).expand(4, 2), torch.stack([angles.cos(), angles.sin()], 1)
    assert pair_spearman(a, b, [5, 4, 2, 0]) == pytest.approx(100)
