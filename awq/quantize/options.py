"""`QuantizeOptions`: how scales, ranges and codes are found. What is stored is `AwqConfig`'s
business."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from awq.errors import ConfigError
from awq.nn.surgery import usable_device

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"rounding": "nearest", "refinement": 0, "tuning": 0, "correction": 0.0},
    "balanced": {"rounding": "feedback", "refinement": 1, "tuning": 0, "correction": 0.5},
    "best": {"rounding": "feedback", "refinement": 2, "tuning": 3, "correction": 0.5},
}
_CHOICES = {
    "preset": tuple(PRESETS),
    "rounding": ("nearest", "feedback"),
}
_SWITCHES = ("scaling", "duo_scaling", "clip", "bias_correction", "export_compatible", "progress")
MAX_ROUNDS = 100  # of refinement and tuning: more would take days and change nothing
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class QuantizeOptions:
    """Switches of the quantizer.

    preset: "fast" (AWQ scales and ranges, nearest rounding), "balanced" (the same, then
        error-feedback rounding and coordinate descent) or "best" (more of it, then scales,
        codes, norms and biases are tuned on the whole model's output).
    rounding: "nearest" or "feedback"; None takes the preset's.
    refinement: rounds of coordinate descent and least-squares scales after feedback; None takes the
    preset's.
    correction: share, 0 to 1, of what quantized predecessors changed in a linear's input that its
        codes make up for (`awq.quantize.input_error`; with rounding "feedback"); None takes the
        preset's.
    tuning: epochs of end-to-end tuning; needs memory for gradients of the whole model; None takes
    the preset's.
    scaling: search and fold activation-aware scales; duo_scaling adds the candidates that look at
    the weights too.
    clip: search each group's range; False keeps min/max.
    bias_correction: the mean of the output error on the calibration tokens goes into the bias of
        linears that have one (Nagel et al., arXiv 1906.04721), and codes are chosen for what is
        left.
    towers: vision or audio towers to quantize, too, by a part of their names ("visual");
        calibration data has to hold images or sound for them. Others stay dense.
    export_compatible: write quantized values back into ordinary linears instead of packing them.
    device: where a block is worked on; None takes the model's own device, or the GPU when the model
    is on the CPU.
    seed: of the random scales in the proof of folds.
    progress: show a progress bar; None means when stderr is a terminal.

    Raises ConfigError for values of another type or out of range.
    """

    preset: str = "balanced"
    rounding: str | None = None
    refinement: int | None = None
    tuning: int | None = None
    correction: float | None = None
    scaling: bool = True
    duo_scaling: bool = True
    clip: bool = True
    bias_correction: bool = True
    towers: tuple[str, ...] = ()
    export_compatible: bool = False
    device: str | None = None
    seed: int = 0
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed and not (name == "rounding" and value is None):
                raise ConfigError(f"{name} is {value!r}; use one of {', '.join(allowed)}.")

        for name in ("refinement", "tuning"):
            _check_whole_number(name, getattr(self, name), MAX_ROUNDS, optional=True)
        _check_whole_number("seed", self.seed, MAX_SEED)
        share = self.correction
        if share is not None and (
            isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1
        ):
            raise ConfigError(f"correction is {share!r}; use a share from 0 to 1.")

        for name in _SWITCHES:
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "progress" and value is None):
                raise ConfigError(f"{name} is {value!r}; use True or False.")

        object.__setattr__(self, "towers", _names(self.towers))
        if self.device is not None:
            usable_device(self.device)
            # torch.device too; a report is written as JSON
            object.__setattr__(self, "device", str(self.device))

        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def with_(self, **changes: Any) -> QuantizeOptions:
        return replace(self, **changes)


def _names(given: Any) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else given
    if isinstance(names, (list, tuple)) and all(isinstance(n, str) and n for n in names):
        return tuple(names)
    raise ConfigError(f"towers is {given!r}; give names of modules, as ('visual',).")


def _check_whole_number(name: str, value: Any, most: int, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ConfigError(f"{name} is {value!r}; use a whole number from 0 to {most}.")
