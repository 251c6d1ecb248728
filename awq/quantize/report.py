"""`QuantReport`: what the quantizer did to every linear, for people (`summary`) and machines
(`to_dict`)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class LinearReport:
    """One quantized linear.

    loss, loss_rtn: output error relative to the output's energy, tr(Δ G Δᵀ) / tr(W G Wᵀ), after all
    steps and for plain round-to-nearest. clip_fraction: share of groups whose range was narrowed.
    producer: the module that took 1/s, if any.
    """

    name: str
    shape: tuple[int, int]
    kind: str
    ratio: float
    loss: float
    loss_rtn: float
    clip_fraction: float
    rounding: str
    producer: str | None
    reason: str
    seconds: float


@dataclass
class QuantReport:
    """Result of `quantize_model`; losses are relative (0.01 = 1 % of the output's energy)."""

    config: dict[str, Any]
    options: dict[str, Any]
    linears: list[LinearReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    # end to end (`tuning.TuningReport`); None when it did not run
    tuning: dict[str, Any] | None = None
    tokens: int = 0
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    # name → tokens that each expert got (`experts.ExpertTokens`)
    experts: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    # "measured", and for a streamed run "planned" → bytes of memory and gpu_memory, seconds
    resources: dict[str, dict[str, float]] = field(default_factory=dict)
    # figures before and after, a dataclass with `summary()`, e.g. `evals.similarity.EmbeddingDrift`
    evaluation: Any = None
    command: str | None = None  # as it was typed, where quantization was one command

    @property
    def loss(self) -> float:
        """Mean relative loss over linears."""
        return sum(r.loss for r in self.linears) / max(1, len(self.linears))

    @property
    def loss_rtn(self) -> float:
        return sum(r.loss_rtn for r in self.linears) / max(1, len(self.linears))

    @property
    def modules_to_not_convert(self) -> list[str]:
        return sorted(self.skipped)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"loss": self.loss, "loss_rtn": self.loss_rtn}

    def save(self, path: str | Path) -> None:
        Path(path).write_text(
            json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    def summary(self) -> str:
        """A few lines for a terminal or a model card."""
        scaled = sum(1 for r in self.linears if r.kind != "identity")
        lines = [
            f"{_linears(len(self.linears))} quantized in {self.seconds:.1f} s on {self.tokens} "
            "calibration tokens",
            f"relative output error {self.loss:.4f} (round to nearest {self.loss_rtn:.4f})",
            f"{_linears(scaled)} with activation-aware scales, {_linears(len(self.skipped))} left "
            "in full precision",
        ]
        if self.tuning:
            t = self.tuning
            lines.append(
                f"tuned end to end: held-out {t['kind']} {t['loss_before']:.5f} -> "
                f"{t['loss_after']:.5f}, epoch {t['best_epoch']}"
            )

        if self.evaluation is not None:
            lines.append(self.evaluation.summary())
        return "\n".join(lines + [f"warning: {w}" for w in self.warnings])


def _linears(count: int) -> str:
    return "1 linear" if count == 1 else f"{count} linears"
