"""Quality gates: limits on what quantization may cost, checked on measured figures.

A gate stands for a decision that would otherwise be made by looking at a table: a build that must
not ship a worse model. `awq quantize` and `awq eval` end with status 1 when a gate is not kept, so
that a script can act on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from awq.errors import ConfigError


@dataclass(frozen=True)
class Gates:
    """Limits; None means no limit.

    max_kl: mean KL divergence from full precision, nats a token. max_ppl_increase: percent of the
    perplexity before.
    min_cosine: mean cosine of embeddings to those of full precision.
    """

    max_kl: float | None = None
    max_ppl_increase: float | None = None
    min_cosine: float | None = None

    @property
    def wanted(self) -> bool:
        """Whether there is any limit."""
        return self != Gates()

    def check(self, embedding: bool, has_texts: bool) -> None:
        """Raises ConfigError, before any work, for limits whose figures this kind of model will not
        have.

        embedding: whether it is an embedding model. has_texts: whether a text to measure a language
        model on is given.
        """
        if embedding and (self.max_kl is not None or self.max_ppl_increase is not None):
            raise ConfigError(
                "max_kl and max_ppl_increase are for language models; use min_cosine for an "
                "embedding model."
            )
        if not embedding and self.min_cosine is not None:
            raise ConfigError(
                "min_cosine is for embedding models; use max_kl or max_ppl_increase for a "
                "language model."
            )
        if not embedding and self.wanted and not has_texts:
            raise ConfigError(
                "max_kl and max_ppl_increase need a text to measure on; give --evaluate FILE."
            )

    def failures(self, figures: Mapping[str, Any]) -> list[str]:
        """One sentence for each limit that `figures` do not keep; empty when all are kept.

        figures: `to_dict()` of a `Divergence` or an `EmbeddingDrift`; of several texts each keeps
        the limits. Raises ConfigError when a
        limit asks for a figure that is not among them. A figure that is not a number keeps no
        limit.

        >>> Gates(max_kl=0.1).failures({"mean_kl": 0.25})
        ['mean KL 0.25 is above 0.1']
        """
        if isinstance(figures.get("texts"), Mapping):
            return [
                f"{name}: {failure}"
                for name, of_text in figures["texts"].items()
                for failure in self.failures(of_text)
            ]

        found = []
        if self.max_kl is not None:
            value = _figure(figures, "mean_kl", "max_kl")
            if not value <= self.max_kl:
                found.append(f"mean KL {value:.4g} is above {self.max_kl:g}")

        if self.max_ppl_increase is not None:
            value = 100 * (_figure(figures, "perplexity_ratio", "max_ppl_increase") - 1)
            if not value <= self.max_ppl_increase:
                found.append(
                    f"perplexity rose by {value:.4g} %, more than {self.max_ppl_increase:g} %"
                )

        if self.min_cosine is not None:
            value = _figure(figures, "mean_cosine", "min_cosine")
            if not value >= self.min_cosine:
                found.append(f"mean cosine {value:.4g} is below {self.min_cosine:g}")

        return found


def _figure(figures: Mapping[str, Any], name: str, gate: str) -> float:
    if figures.get(name) is None:
        raise ConfigError(
            f"{gate} needs {name}, which was not measured; give texts to compare on with "
            "--evaluate."
        )
    return float(figures[name])
