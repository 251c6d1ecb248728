"""How far a quantized language model's predictions moved: KL divergence and token flips, with
intervals.

Perplexity on one text can stay the same while answers change: errors in both directions cancel. The
Kullback-Leibler divergence of the next-token distributions cannot cancel, and it follows the share
of changed answers closely ("Accuracy is not all you need", arXiv 2407.09141). So it is the figure
to compare quantizers by:

    KL      Σ_v p(v) · log(p(v) / q(v)) in nats, p of the full-precision model, q of the quantized
    one, for every token flips   share of tokens whose most likely next token is another one

Both models read the same windows of text, one window at a time: nothing but two numbers per token
is kept, so a long text needs no more memory than a short one. Tokens of one passage fail together,
hence the intervals resample runs of tokens (a block bootstrap) rather than single ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awq.errors import ConfigError
from awq.evals.perplexity import device_of, exp_of
from awq.nn.model_code import model_code

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
RESAMPLES = 1000
BLOCK_TOKENS = 128  # resampled together
CHUNK_TOKENS = 256  # whose distributions are in memory at once, in float32
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Divergence:
    """A quantized model against the full-precision one, on the same text.

    tokens: predictions compared. mean_kl: nats per token. kl_interval, agreement_interval: 95 %, by
    block bootstrap.
    kl_percentiles: by percentile ("50", "90", "99", "99.9"). top1_agreement: share of tokens with
    the same first choice.
    perplexity_before, perplexity_after: on the same tokens. perplexity_ratio: after over before;
    its interval resamples both models' losses together, so it is far narrower than those of the two
    perplexities.
    """

    tokens: int
    mean_kl: float
    kl_interval: tuple[float, float]
    kl_percentiles: dict[str, float]
    top1_agreement: float
    agreement_interval: tuple[float, float]
    perplexity_before: float
    perplexity_after: float
    perplexity_before_interval: tuple[float, float]
    perplexity_after_interval: tuple[float, float]
    perplexity_ratio: float
    ratio_interval: tuple[float, float]

    @property
    def flips(self) -> float:
        """Share of tokens whose most likely next token changed."""
        return 1 - self.top1_agreement

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"flips": self.flips}

    def summary(self) -> str:
        """Two lines for a terminal or a model card."""
        low, high = self.kl_interval
        tail = ", ".join(f"{name} %: {value:.4f}" for name, value in self.kl_percentiles.items())
        same_low, same_high = (100 * bound for bound in self.agreement_interval)
        less, more = (100 * (bound - 1) for bound in self.ratio_interval)

        return (
            f"KL divergence from full precision on {self.tokens} tokens: {self.mean_kl:.4f} nats "
            f"({low:.4f}–{high:.4f}; {tail})\n"
            f"same most likely token: {100 * self.top1_agreement:.2f} % "
            f"({same_low:.2f}–{same_high:.2f}); "
            f"perplexity {self.perplexity_before:.3f} before, {self.perplexity_after:.3f} after "
            f"({100 * (self.perplexity_ratio - 1):+.2f} %; {less:+.2f} to {more:+.2f})"
        )


@torch.no_grad()
def divergence(
    reference: Any,
    model: Any,
    input_ids: Tensor,
    window: int = 1024,
    limit: int | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> Divergence:
    """Compares the next-token distributions of two models on a text.

    reference, model: saved directories (dense or quantized), or callables of input_ids [1, n] whose
    result has `.logits`.
    input_ids: int64 [tokens] of one text, or [rows, tokens] of separate ones. Windows of `window`
    tokens do not overlap; each of their tokens but the last predicts the next one. limit: use only
    so many tokens. device: where directories are loaded; None takes the GPU if there is one. seed:
    of the bootstrap.
    Raises ConfigError when there is nothing to predict, or when the vocabularies differ.

    >>> same = divergence("my-model", "my-model", torch.arange(32), device="cpu")
    >>> same.mean_kl, same.flips
    (0.0, 0.0)
    """
    windows = list(_windows(input_ids, window, limit))
    if not windows:
        raise ConfigError(
            f"divergence needs a window of at least 2 tokens; got {input_ids.numel()} tokens, "
            f"window {window}."
        )

    parts = []
    with _loaded(reference, device) as before, _loaded(model, device) as after:
        for ids in windows:
            parts.append(_compare(_logits(before, ids), _logits(after, ids), ids[1:]))

    return _summarised(torch.cat(parts, 1), seed)


def token_divergence(reference: Tensor, found: Tensor) -> Tensor:
    """KL(reference ‖ found) in nats, float32 [tokens], of logits [tokens, vocabulary]."""
    wanted = F.log_softmax(reference.float(), -1)
    return F.kl_div(
        F.log_softmax(found.float(), -1), wanted, log_target=True, reduction="none"
    ).sum(-1)


def bootstrap_interval(
    values: Tensor,
    seed: int = 0,
    block: int = BLOCK_TOKENS,
) -> tuple[float, float]:
    """95 % interval of the mean of `values` [tokens], resampling blocks of neighbours.

    A text of one block only has no spread to show: both ends are the mean.
    """
    blocks = [part.double() for part in values.split(block)]
    sums = torch.stack([part.sum() for part in blocks])
    counts = torch.tensor([len(part) for part in blocks], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(blocks), (RESAMPLES, len(blocks)), generator=generator)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()

    return low, high


def perplexity_interval(losses: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % interval of exp(mean) of negative log likelihoods [tokens]: of a perplexity, or of a
    ratio of two of them."""
    low, high = bootstrap_interval(losses, seed)
    return exp_of(low), exp_of(high)


def _windows(input_ids: Tensor, window: int, limit: int | None) -> Iterator[Tensor]:
    rows = input_ids if input_ids.dim() == 2 else input_ids.reshape(1, -1)
    left = rows.numel() if limit is None else limit
    size = max(window, 1)
    for row in rows:
        for ids in row[:left].split(size):
            if len(ids) > 1:
                yield ids
        left = max(0, left - len(row))


@contextmanager
def _loaded(model: Any, device: str | torch.device | None) -> Iterator[Callable]:
    """The model itself, or the one of a directory, which is dropped afterwards."""
    if not isinstance(model, (str, Path)):
        yield model
        return

    from transformers import AutoModelForCausalLM

    from awq.checkpoint.load import load_model

    loaded = load_model(model, "auto", kind=AutoModelForCausalLM)
    yield loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def _logits(model: Any, ids: Tensor) -> Tensor:
    """[tokens − 1, vocabulary]: what each token but the last says of the next one."""
    home = device_of(model) if isinstance(model, nn.Module) else ids.device
    with model_code(type(model).__name__):
        return model(input_ids=ids.unsqueeze(0).to(home)).logits[0, :-1]


def _compare(before: Tensor, after: Tensor, wanted: Tensor) -> Tensor:
    """Per token: KL, same first choice, negative log likelihood before and after. float32 [4,
    tokens] on the CPU."""
    if before.shape[-1] != after.shape[-1]:
        raise ConfigError(
            f"the models predict {before.shape[-1]} and {after.shape[-1]} tokens; give two of one "
            "vocabulary."
        )

    after = after.to(before.device)
    wanted = wanted.to(before.device)

    rows = []
    for start in range(0, len(before), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        first = before[part].float()
        second = after[part].float()
        rows.append(
            torch.stack(
                [
                    token_divergence(first, second),
                    (first.argmax(-1) == second.argmax(-1)).float(),
                    F.cross_entropy(first, wanted[part], reduction="none"),
                    F.cross_entropy(second, wanted[part], reduction="none"),
                ]
            )
        )

    return torch.cat(rows, 1).cpu()


def _summarised(values: Tensor, seed: int) -> Divergence:
    kl, same, loss_before, loss_after = values.double()
    ranks = torch.tensor([p / 100 for p in PERCENTILES], dtype=torch.float64)
    return Divergence(
        tokens=len(kl),
        mean_kl=float(kl.mean()),
        kl_interval=bootstrap_interval(kl, seed),
        kl_percentiles={f"{p:g}": float(v) for p, v in zip(PERCENTILES, kl.quantile(ranks))},
        top1_agreement=float(same.mean()),
        agreement_interval=bootstrap_interval(same, seed),
        perplexity_before=exp_of(float(loss_before.mean())),
        perplexity_after=exp_of(float(loss_after.mean())),
        perplexity_before_interval=perplexity_interval(loss_before, seed),
        perplexity_after_interval=perplexity_interval(loss_after, seed),
        perplexity_ratio=exp_of(float((loss_after - loss_before).mean())),
        ratio_interval=perplexity_interval(loss_after - loss_before, seed),
    )
