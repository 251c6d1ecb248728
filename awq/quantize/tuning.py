"""End-to-end tuning of the scales: the last step of the preset "best".

Codes and zeros stay; each group's scale becomes s·(1 + d), and d is trained so that the quantized
model's output matches the original's on the calibration tokens: the Kullback–Leibler divergence of
the next-token distributions for a language model (distillation, arXiv 1503.02531; scales only, as
in EfficientQAT's second phase, arXiv 2407.11062), the cosine of the embeddings for an embedding
model, the relative squared error of the last hidden states for any other encoder. Part of the
tokens is held out, and the epoch that is best on them is kept: no tuning at all is one of the
choices. Only float16 scales change, so the file format and its cost at run time do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPast

from awq.calibration import CalibrationBatch
from awq.calibration.batches import rebatched
from awq.core.weight import QuantizedWeight, storable_scale
from awq.nn.block_calls import hidden_of, map_tensors, no_cache, replaced_forwards
from awq.nn.blocks import find_block_lists
from awq.nn.surgery import replace_module
from awq.quantize.progress import ProgressLines

# float hidden states [batch, tokens, features] and mask [batch, tokens] → embeddings
Embed = Callable[[Tensor, Tensor], Tensor]

_SLOWER = 3  # the rate is divided by it after an epoch that gained nothing
_STEP_TOKENS, _STEP_ROWS = 2048, 32  # largest micro-batch
_HELD_OUT = 8  # one batch in eight judges
_WARM_UP = 10  # steps, and at most a tenth of all
# quantized weights above which the blocks' activations are computed twice instead of kept
_LARGE = 1 << 29


@dataclass(frozen=True)
class Pace:
    """rate: of the relative change of a scale, Adam with a cosine schedule. together: micro-batches
    in a step."""

    rate: float
    together: int


# What a next token tells of a model is noisy, so a step sums over more of it. Each measured on its
# own kind of model (docs/notes/quality_log.md).
OF_TOKENS, OF_EMBEDDINGS = Pace(5e-4, 4), Pace(2e-3, 1)


@dataclass
class TuningReport:
    """kind: "kl" (nats per token), "cosine" (1 − cosine of a text's embeddings) or "mse" (relative
    to the energy of the hidden states); losses on held-out tokens.

    best_epoch 0 means that the scales stayed as they were.
    """

    kind: str
    epochs: int
    best_epoch: int
    loss_before: float
    loss_after: float


class _Product(torch.autograd.Function):
    """x [..., in] times dequantized weightᵀ with a gradient for the scales; the dense weight is
    never kept for backward."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, steps: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, steps)
        return F.linear(x, _dense(steps, scale, x.dtype))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        x, scale, steps = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _dense(steps, scale, x.dtype)
        grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2)  # [out, in]
        by_group = grad_weight.view(*scale.shape, -1).float()
        grad_scale = (by_group * steps.view(*scale.shape, -1)).sum(-1)
        return grad_x, grad_scale, None


def _dense(steps: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (steps.view(*scale.shape, -1) * scale.unsqueeze(-1)).view(steps.shape).to(dtype)


class TunedLinear(nn.Module):
    """A quantized linear whose scales are trained: weight = (codes − zeros) · s · (1 + change)."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, device: torch.device) -> None:
        super().__init__()
        self.steps = weight.steps().to(device)
        self.start = weight.scales.float().to(device)
        self.change = nn.Parameter(torch.zeros_like(self.start))
        self.bias = bias

    @property
    def scale(self) -> Tensor:
        return self.start * (1 + self.change)

    def forward(self, x: Tensor) -> Tensor:
        out = _Product.apply(x, self.scale, self.steps)
        return out if self.bias is None else out + self.bias


def held_out(count: int) -> frozenset[int]:
    """Batches that judge the tuning, of `count`. Fewer than eight have none to spare.

    Correction of drift must not see them either: its own gain on tokens that it has seen is more
    than tuning can gain.
    """
    return frozenset(range(_HELD_OUT - 1, count, _HELD_OUT))


class OutputMatch:
    """The original model's last hidden states on the calibration tokens, and the distance of
    another model's output to them.

    Made before quantization begins, of `micro_batches`. Needs tokens × features values of memory in
    the model's dtype.
    held_out: which of the batches judge, by `held_out`; with none, all of them train and judge.
    embed: what an embedding model makes of its hidden states [batch, tokens, features] and mask.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[CalibrationBatch],
        held_out: Collection[int] = (),
        embed: Embed | None = None,
    ) -> None:
        self.model: Any = model
        self.body: Any = getattr(model, "base_model", model)
        find_head = getattr(self.model, "get_output_embeddings", None)
        head = find_head() if find_head is not None else None
        self.embed = embed
        self.kind = "kl" if head is not None and self.body is not model else "mse"
        if embed is not None:
            self.kind = "cosine"
        # what the body returns: heads read other fields of it
        self.output: Any = BaseModelOutputWithPast
        device = next(model.parameters()).device
        self.batches = [
            CalibrationBatch(*map_tensors(tuple(batch), lambda t: t.to(device)))
            for batch in batches
        ]
        self.training = [i for i in range(len(batches)) if i not in held_out]
        self.judging = sorted(held_out) or self.training
        with torch.no_grad(), _float32_on_cpu(model):
            self.targets = [self._hidden(batch) for batch in self.batches]

    def _hidden(self, batch: CalibrationBatch) -> Tensor:
        output = self.body(**self._inputs(batch))
        self.output = (
            type(output) if hasattr(output, "last_hidden_state") else BaseModelOutputWithPast
        )
        return (
            output.last_hidden_state if hasattr(output, "last_hidden_state") else hidden_of(output)
        )

    def _inputs(self, batch: CalibrationBatch) -> dict[str, Any]:
        return batch.model_inputs() | no_cache(self.model)

    def _unit_embedding(self, hidden: Tensor, batch: CalibrationBatch) -> Tensor:
        assert self.embed is not None
        return F.normalize(self.embed(hidden.float(), batch.attention_mask).float(), dim=-1)

    def _logits(self, batch: CalibrationBatch, hidden: Tensor) -> Tensor:
        """What the model makes of its body's hidden states: its own head, with whatever caps and
        factors it applies."""
        output = self.output(last_hidden_state=hidden)
        with replaced_forwards({self.body: lambda *args, **kwargs: output}):
            return self.model(**self._inputs(batch)).logits

    def distance(self, index: int) -> tuple[Tensor, int]:
        """Summed distance of the model's present output to the original one on micro-batch `index`,
        and its weight."""
        batch, target = self.batches[index], self.targets[index]
        hidden = self._hidden(batch)
        if self.embed is not None:
            return self._one_minus_cosine(batch, hidden, target), len(hidden)
        tokens = int(batch.attention_mask.sum())
        if self.kind == "mse":
            mask = batch.attention_mask.bool()
            return _relative_error(hidden[mask], target[mask]) * tokens, tokens
        return self._kl(batch, hidden, target), tokens

    def _one_minus_cosine(self, batch: CalibrationBatch, hidden: Tensor, target: Tensor) -> Tensor:
        """Summed over the texts: half the squared distance of unit vectors."""
        mine, wanted = (self._unit_embedding(h, batch) for h in (hidden, target))
        return (mine - wanted).pow(2).sum() / 2

    def _kl(self, batch: CalibrationBatch, hidden: Tensor, target: Tensor) -> Tensor:
        """Nats, summed over the tokens."""
        mask = batch.attention_mask.bool()
        with torch.no_grad():
            wanted = F.log_softmax(self._logits(batch, target)[mask].float(), -1)
        found = F.log_softmax(self._logits(batch, hidden)[mask].float(), -1)
        return F.kl_div(found, wanted, log_target=True, reduction="sum")


def _relative_error(hidden: Tensor, target: Tensor) -> Tensor:
    """‖hidden − target‖² / ‖target‖²"""
    target = target.float()
    return (hidden.float() - target).pow(2).sum() / target.pow(2).sum().clamp(min=1e-30)


def tune_scales(
    model: nn.Module,
    weights: dict[str, QuantizedWeight],
    match: OutputMatch,
    epochs: int,
    seed: int = 0,
    progress: bool | None = None,
) -> tuple[dict[str, QuantizedWeight], TuningReport]:
    """Tunes the scales of the modules named in `weights`; returns new weights and what was gained.

    An epoch that does not lower the held-out loss is taken back, and the rates fall to a third. The
    model's modules of those names are replaced while it runs and put back after it.
    """
    device = next(model.parameters()).device
    tuned = {
        name: TunedLinear(weight, getattr(model.get_submodule(name), "bias", None), device)
        for name, weight in weights.items()
    }
    with _tuning(model, tuned), _float32_on_cpu(model):
        best_loss = before = _mean_distance(match, match.judging)
        best, best_epoch = _state(tuned), 0
        training = _Training(tuned, match, epochs, seed)
        lines = ProgressLines("tuning step", training.steps)
        with tqdm(
            total=training.steps,
            desc="AWQ tuning",
            unit="step",
            disable=None if progress is None else not progress,
        ) as bar:
            for epoch in range(1, epochs + 1):
                for done in training.epoch():
                    bar.update()
                    lines.done(done, f"{match.kind} {best_loss:.5f}")
                loss = _mean_distance(match, match.judging)
                bar.set_postfix({match.kind: f"{loss:.5f}", "before": f"{before:.5f}"})
                if loss < best_loss:
                    best, best_loss, best_epoch = _state(tuned), loss, epoch
                    continue
                training.slower()
                for name, linear in tuned.items():
                    linear.change.copy_(best[name])
    scales = {
        name: storable_scale(weight.scales.float().to(device) * (1 + best[name]))
        for name, weight in weights.items()
    }
    found = {
        name: weight._replace(scales=scales[name].half().to(weight.scales.device))
        for name, weight in weights.items()
    }
    return found, TuningReport(match.kind, epochs, best_epoch, before, best_loss)


class _Training:
    """Steps of Adam over the training batches; rates rise at first and fall as a cosine does."""

    def __init__(
        self, tuned: Mapping[str, TunedLinear], match: OutputMatch, epochs: int, seed: int
    ) -> None:
        self.match, self.done, self._share = match, 0, 1.0
        self._pace = OF_TOKENS if match.kind == "kl" else OF_EMBEDDINGS
        self.steps = epochs * -(-len(match.training) // self._pace.together)
        self._warm_up = max(1, min(_WARM_UP, self.steps // 10))
        changes = [linear.change for linear in tuned.values()]
        self._optimizer = torch.optim.Adam(changes, betas=(0.9, 0.99))
        self._generator = torch.Generator().manual_seed(seed)

    def slower(self) -> None:
        """Goes on with a third of the rates, and without what the steps before have gathered."""
        self._share /= _SLOWER
        self._optimizer.state.clear()

    def epoch(self) -> Iterator[int]:
        """Every batch once, some in each step; yields the number of steps so far."""
        batches = self.match.training
        order = torch.randperm(len(batches), generator=self._generator).tolist()
        for start in range(0, len(order), self._pace.together):
            fall = 0.5 * (1 + math.cos(math.pi * self.done / self.steps))
            rise = min(1.0, (self.done + 1) / self._warm_up)
            for group in self._optimizer.param_groups:
                group["lr"] = self._share * rise * fall * self._pace.rate
            chosen = order[start : start + self._pace.together]
            for choice in chosen:
                self._add_gradient(batches[choice], 1 / len(chosen))
            self._optimizer.step()
            self._optimizer.zero_grad()
            self.done += 1
            yield self.done

    def _add_gradient(self, batch: int, share: float) -> None:
        with torch.enable_grad():
            total, tokens = self.match.distance(batch)
            weight = share * self.match.batches[batch].weight
            (weight * total / max(1, tokens)).backward()


def micro_batches(batches: Sequence[CalibrationBatch]) -> list[CalibrationBatch]:
    """The same rows in pieces small enough for a step of training."""
    pieces = []
    for batch in batches:
        if any(len(tensor) != len(batch.input_ids) for tensor in batch.extra.values()):
            pieces.append(batch)  # patches of images: no telling whose they are
            continue
        rows = min(_STEP_ROWS, max(1, _STEP_TOKENS // batch.input_ids.shape[1]))
        for start in range(0, len(batch.input_ids), rows):
            piece = CalibrationBatch(*map_tensors(tuple(batch), lambda t: t[start : start + rows]))
            if bool(piece.attention_mask.any()):
                pieces.append(piece)
    return pieces


def in_large_batches(
    pieces: Sequence[CalibrationBatch], tokens: int
) -> tuple[list[CalibrationBatch], frozenset[int]]:
    """The rows of micro-batches in batches of about `tokens`, and which of these judge the tuning.

    Blocks are quantized with them: in micro-batches they wait for the host (SmolLM2-135M on an
    H200: 43 s, where `balanced` takes 12 in large ones). No batch holds both rows that judge and
    rows that do not.
    """
    judging = held_out(len(pieces))
    training = rebatched([b for i, b in enumerate(pieces) if i not in judging], tokens)
    judges = rebatched([pieces[i] for i in sorted(judging)], tokens)
    places = range(len(training), len(training) + len(judges))
    return [*training, *judges], frozenset(places)


def _state(tuned: Mapping[str, TunedLinear]) -> dict[str, Tensor]:
    return {name: linear.change.detach().clone() for name, linear in tuned.items()}


@torch.no_grad()
def _mean_distance(match: OutputMatch, indices: Sequence[int]) -> float:
    """Per token (per text for "cosine"), each with its batch's weight."""
    total = weights = 0.0
    for index in indices:
        distance, count = match.distance(index)
        weight = match.batches[index].weight
        total += weight * float(distance)
        weights += weight * count
    return total / max(1e-9, weights)


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
    for parameter in trainable:
        parameter.requires_grad_(False)
    for name, linear in tuned.items():
        replace_module(model, name, linear)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        # On a GPU only the plain attention has a gradient that is the same twice.
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
        for name, module in before.items():
            replace_module(model, name, module)
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


@contextmanager
def _float32_on_cpu(model: nn.Module) -> Iterator[None]:
    """float16 parameters in float32 for a while on a CPU, whose float16 products are a hundred
    times slower; exact both ways."""
    changed = [p for p in model.parameters() if p.dtype == torch.float16 and p.device.type == "cpu"]
    for parameter in changed:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter in changed:
            parameter.data = parameter.data.half()
