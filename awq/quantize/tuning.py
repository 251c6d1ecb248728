"""End-to-end tuning: the last step of the preset "best".

Scales, codes and the dense vectors of the model (norms and biases) are trained so that the
quantized model's output matches the original's (`awq.quantize.match`): scales as in EfficientQAT's
second phase (arXiv 2407.11062), codes by the straight-through estimator. Part of the tokens is held
out, and the epoch that is best on them is kept: no tuning at all is one of the choices. Zeros stay,
and with them the file format and its cost at run time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from awq.core.weight import QuantizedWeight
from awq.nn.block_calls import replaced_forwards
from awq.nn.blocks import find_block_lists
from awq.nn.surgery import replace_module
from awq.quantize.match import OutputMatch, float32_on_cpu
from awq.quantize.progress import Progress
from awq.quantize.tuned import TunedLinear, Vectors

_SLOWER = 3  # the rates are divided by it after an epoch that gained nothing
_WARM_UP = 10  # steps, and at most a tenth of all
# quantized weights above which the blocks' activations are computed twice instead of kept
_LARGE = 1 << 29
# and above which codes stay: a place and its two moments take 12 bytes a weight
MOST_CODES = 1 << 30


@dataclass(frozen=True)
class Pace:
    """Rates of Adam with a cosine schedule. scales: of the relative change of a scale; vectors: of
    a vector's values, as a share of its root mean square; codes: of places, in steps. tokens: of a
    step; 0: those of a micro-batch."""

    scales: float
    vectors: float
    codes: float
    tokens: int


# What a next token tells of a model is noisy, so a step sums over more of it. Each measured on its
# own kind of model (docs/notes/quality_log.md).
OF_TOKENS, OF_EMBEDDINGS = Pace(1e-3, 5e-4, 1e-3, 8192), Pace(1e-3, 1e-3, 0.0, 0)
OF_STATES = Pace(2e-3, 0.0, 0.0, 0)


@dataclass
class TuningReport:
    """kind: "kl" (nats per token), "cosine" (1 − cosine of a text's embeddings) or "mse" (relative
    to the energy of the hidden states); losses on held-out tokens. codes_moved: share of all.

    best_epoch 0 means that everything stayed as it was.
    """

    kind: str
    epochs: int
    best_epoch: int
    loss_before: float
    loss_after: float
    codes_moved: float = 0.0


def tune_weights(
    model: nn.Module,
    weights: dict[str, QuantizedWeight],
    match: OutputMatch,
    epochs: int,
    seed: int = 0,
    progress: bool | None = None,
    leans: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, QuantizedWeight], TuningReport]:
    """Tunes the modules named in `weights` and the vectors of the model's body; returns new weights
    and what was gained. Vectors are changed in place.

    An epoch that does not lower the held-out loss is taken back, and the rates fall to a third. The
    model's modules of those names are replaced while it runs and put back after it.
    leans: int8 [out, in] by name, where codes begin (`awq.quantize.tuned`); other codes stay.
    """
    with float32_on_cpu(model):
        tuned = _tuned_linears(model, weights, leans or {}, _pace(match))
        with _tuning(model, tuned):
            training = _Training(model, tuned, match, epochs, seed)
            report = _train(training, match, progress)
        found = {name: linear.result() for name, linear in tuned.items()}

    moved = sum(int((found[n].codes != w.codes).sum()) for n, w in weights.items())
    report.codes_moved = moved / max(1, sum(w.codes.numel() for w in weights.values()))

    return found, report


def _train(training: _Training, match: OutputMatch, progress: bool | None) -> TuningReport:
    """All epochs; leaves the best state."""
    epochs = training.epochs
    before = best_loss = match.mean_distance(match.judging)
    best, best_epoch = training.state(), 0

    with Progress("tuning", "step", training.steps, progress) as bar:
        for epoch in range(1, epochs + 1):
            for _ in training.epoch(epoch):
                bar.done(f"{match.kind} {best_loss:.5f}")

            loss = match.mean_distance(match.judging)
            bar.set_postfix({match.kind: f"{loss:.5f}", "before": f"{before:.5f}"})
            if loss < best_loss:
                best, best_loss, best_epoch = training.state(), loss, epoch
                continue

            training.go_back(best)
            training.slower()

    if best_epoch == 0:
        training.give_up()
    return TuningReport(match.kind, epochs, best_epoch, before, best_loss)


def _pace(match: OutputMatch) -> Pace:
    return {"kl": OF_TOKENS, "cosine": OF_EMBEDDINGS, "mse": OF_STATES}[match.kind]


def _tuned_linears(
    model: nn.Module,
    weights: Mapping[str, QuantizedWeight],
    leans: Mapping[str, Tensor],
    pace: Pace,
) -> dict[str, TunedLinear]:
    device = next(model.parameters()).device
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if not pace.codes or sum(w.codes.numel() for w in weights.values()) > MOST_CODES:
        leans = {}

    found = {}
    for name, weight in weights.items():
        bias = getattr(model.get_submodule(name), "bias", None)
        found[name] = TunedLinear(weight, bias, device, dtype, leans.get(name))

    return found


class _Training:
    """Steps of Adam over the training batches; rates rise at first and fall as a cosine does."""

    def __init__(
        self,
        model: nn.Module,
        tuned: Mapping[str, TunedLinear],
        match: OutputMatch,
        epochs: int,
        seed: int,
    ) -> None:
        self.match, self.epochs, self.done, self._share = match, epochs, 0, 1.0
        self._linears = list(tuned.values())
        self._pace = _pace(match)
        largest = max(batch.input_ids.numel() for batch in match.batches)
        self._together = max(1, self._pace.tokens // largest)
        sizes = [len(self._batches(epoch)) for epoch in range(1, epochs + 1)]
        self.steps = sum(-(-size // self._together) for size in sizes)
        self._warm_up = max(1, min(_WARM_UP, self.steps // 10))
        self._vectors = Vectors(_vectors_of(model) if self._pace.vectors else ())
        self._parts: list[TunedLinear | Vectors] = [*self._linears, self._vectors]
        for vector in self._vectors.given:
            vector.requires_grad_(True)

        self._optimizer = torch.optim.Adam(self._groups(), betas=(0.9, 0.99))
        self._generator = torch.Generator().manual_seed(seed)

    def _groups(self) -> list[dict[str, Any]]:
        """For Adam; "rate": at its highest."""
        groups: list[dict[str, Any]] = [
            {"params": [linear.change for linear in self._linears], "rate": self._pace.scales}
        ]
        places = [linear.place for linear in self._linears if linear.place is not None]
        if places:
            groups.append({"params": places, "rate": self._pace.codes})
        for copy, size in zip(self._vectors.copies, self._vectors.sizes()):
            groups.append({"params": [copy], "rate": size * self._pace.vectors})

        return groups

    def _batches(self, epoch: int) -> list[int]:
        """Each epoch has a retelling of its own."""
        return self.match.epochs[(epoch - 1) % len(self.match.epochs)]

    def slower(self) -> None:
        """Goes on with a third of the rates, and without what the steps before have gathered."""
        self._share /= _SLOWER
        self._optimizer.state.clear()

    def epoch(self, number: int) -> Iterator[None]:
        """Every batch once, some in each step; yields after every step."""
        batches, together = self._batches(number), self._together
        order = torch.randperm(len(batches), generator=self._generator).tolist()
        for start in range(0, len(order), together):
            fall = 0.5 * (1 + math.cos(math.pi * self.done / self.steps))
            rise = min(1.0, (self.done + 1) / self._warm_up)
            for group in self._optimizer.param_groups:
                group["lr"] = self._share * rise * fall * group["rate"]

            chosen = order[start : start + together]
            for choice in chosen:
                self._add_gradient(batches[choice], 1 / len(chosen))
            for part in self._parts:
                part.pass_on()

            self._optimizer.step()
            self._optimizer.zero_grad()
            self._write()
            self.done += 1
            yield

    def _add_gradient(self, batch: int, share: float) -> None:
        with torch.enable_grad():
            total, tokens = self.match.distance(batch, training=True)
            weight = share * self.match.batches[batch].weight
            (weight * total / max(1, tokens)).backward()

    def _write(self) -> None:
        for part in self._parts:
            part.write()

    def _trained(self) -> list[nn.Parameter]:
        return [p for linear in self._linears for p in linear.trained()] + self._vectors.copies

    def state(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._trained()]

    @torch.no_grad()
    def go_back(self, state: list[Tensor]) -> None:
        for parameter, value in zip(self._trained(), state):
            parameter.copy_(value)
        self._write()

    def give_up(self) -> None:
        """Vectors as they were, to the bit: copies of 16 bits come back exactly, too."""
        self._vectors.restore()


def _vectors_of(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of one dimension in the model's body: weights and biases of norms, biases of
    linears. What stands behind the body, as a head, made the targets and stays."""
    body: Any = getattr(model, "base_model", model)
    return [p for p in body.parameters() if p.dim() == 1 and p.is_floating_point()]


@contextmanager
def _tuning(model: nn.Module, tuned: dict[str, TunedLinear]) -> Iterator[None]:
    """The tuned linears in their places, nothing else trainable, deterministic gradients;
    everything is put back after."""
    before = {name: model.get_submodule(name) for name in tuned}
    trainable = [p for p in model.parameters() if p.requires_grad]
    deterministic = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, linear in tuned.items():
        replace_module(model, name, linear)

    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing here reads memory that it has not written, and filling it first is a third of all
    # kernels.
    memory.fill_uninitialized_memory = False
    try:
        # On a GPU only the plain attention has a gradient that is the same twice: flash attention's
        # is not, where deterministic algorithms only warn.
        with (
            sdpa_kernel(SDPBackend.MATH),
            replaced_forwards(
                _checkpointed(model)
                if sum(t.steps.numel() for t in tuned.values()) > _LARGE
                else {}
            ),
        ):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        memory.fill_uninitialized_memory = filled
        for name, module in before.items():
            replace_module(model, name, module)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)


def _checkpointed(model: nn.Module) -> dict[nn.Module, Any]:
    """Forwards of the blocks that keep only their inputs for backward and compute the rest
    again."""

    def again(forward):
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return {
        block: again(block.forward) for _, blocks in find_block_lists(model) for block in blocks
    }
