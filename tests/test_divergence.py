"""KL divergence and flips: laws of the figures, and the same answer however the text is cut or the
models are given."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from awq.errors import ConfigError
from awq.evals.divergence import bootstrap_interval, divergence, token_divergence

VOCABULARY = 40


def table_model(seed: int, noise: float = 0.0):
    """Predicts from the present token alone, so windows do not matter but for their last tokens."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    table = table + noise * torch.randn(
        VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed + 1)
    )
    return lambda input_ids: SimpleNamespace(logits=table[input_ids])


@pytest.fixture(scope="module")
def ids():
    return torch.randint(VOCABULARY, (2000,), generator=torch.Generator().manual_seed(3))


def test_a_model_does_not_diverge_from_itself(ids):
    found = divergence(table_model(0), table_model(0), ids)
    assert found.mean_kl == 0 and found.flips == 0 and found.kl_interval == (0, 0)
    assert found.perplexity_before == found.perplexity_after and found.tokens == 2000 - math.ceil(
        2000 / 1024
    )


def test_kl_by_its_definition():
    p, q = torch.randn(2, 7, 30, dtype=torch.float64)
    wanted = (p.softmax(-1) * (p.softmax(-1) / q.softmax(-1)).log()).sum(-1)
    torch.testing.assert_close(token_divergence(p, q).double(), wanted, atol=1e-6, rtol=1e-5)
    assert bool((token_divergence(p, q) >= 0).all())


def test_figures_against_plain_arithmetic(ids):
    first, second = table_model(0), table_model(0, 0.3)
    found = divergence(first, second, ids, window=2000)
    a, b = first(ids[:-1]).logits, second(ids[:-1]).logits
    assert found.mean_kl == pytest.approx(float(token_divergence(a, b).mean()), rel=1e-5)
    assert found.top1_agreement == pytest.approx(
        float((a.argmax(-1) == b.argmax(-1)).float().mean())
    )
    assert found.perplexity_before == pytest.approx(math.exp(F.cross_entropy(a, ids[1:])), rel=1e-5)
    assert found.kl_percentiles["50"] < found.kl_percentiles["90"] < found.kl_percentiles["99.9"]
    for value, (low, high) in (
        (found.mean_kl, found.kl_interval),
        (found.top1_agreement, found.agreement_interval),
    ):
        assert low < value < high
    assert (
        f"{found.mean_kl:.4f} nats" in found.summary() and found.to_dict()["flips"] == found.flips
    )


def test_more_noise_diverges_more(ids):
    kls = [
        divergence(table_model(0), table_model(0, noise), ids).mean_kl for noise in (0.1, 0.3, 1.0)
    ]
    assert kls == sorted(kls) and kls[0] > 0


def test_windows_rows_and_limit(ids):
    models = table_model(0), table_model(0, 0.3)
    rows = divergence(*models, ids.view(20, 100), window=100)
    assert rows.mean_kl == divergence(*models, ids, window=100).mean_kl and rows.tokens == 20 * 99
    assert divergence(*models, ids, limit=50).tokens == 49
    assert divergence(*models, ids.view(100, 20), window=100, limit=50).tokens == 47


def test_intervals_cover_the_mean_as_often_as_they_say():
    """Blocks of neighbours that fail together: 95 % intervals cover the true mean in 85 to 100 % of
    200 texts."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(200):
        values = torch.randn(60, 1, generator=generator).expand(60, 128).reshape(-1)
        low, high = bootstrap_interval(values, seed)
        covered += low < 0 < high
    assert 170 <= covered <= 200


def test_nothing_to_predict_and_other_vocabularies(ids):
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        divergence(table_model(0), table_model(0), ids[:1])
    narrow = lambda input_ids: SimpleNamespace(logits=torch.zeros(*input_ids.shape, 8))  # noqa: E731
    with pytest.raises(ConfigError, match="one vocabulary"):
        divergence(table_model(0), narrow, ids)


def test_from_saved_directories(llama_dir, tokenizer, texts, tmp_path):
    from awq import AutoAWQForCausalLM

    model = AutoAWQForCausalLM.from_pretrained(str(llama_dir))
    model.quantize(tokenizer, {"q_group_size": 16}, texts, preset="fast")
    model.save_quantized(str(tmp_path / "q"))
    ids = torch.randint(4, 30, (3, 40), generator=torch.Generator().manual_seed(0))
    found = divergence(llama_dir, tmp_path / "q", ids, device="cpu")
    assert 0 < found.mean_kl < 0.1 and found.tokens == 3 * 39
    live = divergence(llama_dir, model.model, ids, device="cpu")
    assert live.mean_kl == pytest.approx(found.mean_kl, rel=1e-3)
