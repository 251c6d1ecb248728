"""What tuning aims at: the original model's output on the calibration tokens, and how far another
model's output is from it.

The distance is the Kullback–Leibler divergence of the next-token distributions for a language
model (distillation, arXiv 1503.02531), the cosine of the embeddings for an embedding model, the
relative squared error of the last hidden states for any other encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from awq.calibration import CalibrationBatch
from awq.calibration.batches import rebatched
from awq.nn.block_calls import hidden_of, map_tensors, no_cache, replaced_forwards
from awq.quantize.progress import Progress

# float hidden states [batch, tokens, features] and mask [batch, tokens] → embeddings
Embed = Callable[[Tensor, Tensor], Tensor]

_STEP_TOKENS, _STEP_ROWS = 2048, 32  # largest micro-batch
# on a GPU, which waits for the host in small ones, and how many of them there should be at least
_GPU_STEP_TOKENS, _ENOUGH = 8192, 8
_HELD_OUT = 8  # one batch in eight judges
RETOLD_SHARE = 0.3  # of a retold row's tokens, which the model chose
STATES_SHARE = 0.3  # of the hidden states' error beside the embeddings' in training
RETELLINGS = 1  # of every training row in an epoch, beside the row itself


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
    the model's dtype, and as many for each retelling.
    held_out: which of the batches judge, by `held_out`; with none, all of them train and judge.
    embed: what an embedding model makes of its hidden states [batch, tokens, features] and mask.
    epochs: of tuning. In each, a language model's training rows come with `RETELLINGS` that were
    not seen before (`retold`): text of the same kinds, for as many tokens as tuning wants.
    training: indices of the batches that train; epochs: the same and the retellings of each epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[CalibrationBatch],
        held_out: Collection[int] = (),
        embed: Embed | None = None,
        epochs: int = 1,
        seed: int = 0,
        progress: bool | None = False,
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
        self.epochs = [list(self.training) for _ in range(max(1, epochs))]

        self.targets: list[Tensor] = []
        generator = torch.Generator(device=device).manual_seed(seed)
        retellings = RETELLINGS if self.kind == "kl" else 0
        forwards = len(batches) + retellings * len(self.epochs) * len(self.training)

        with (
            torch.no_grad(),
            float32_on_cpu(model),
            Progress("targets", "batch", forwards, progress) as bar,
        ):
            for batch in self.batches:
                self.targets.append(self._hidden(batch))
                bar.done()

            for epoch in self.epochs:
                for _ in range(retellings):
                    epoch += self._retold(generator, bar)

    def _retold(self, generator: torch.Generator, bar: Progress) -> list[int]:
        """Adds batches that tell the training ones again, where these are text alone; their
        indices."""
        found = []
        for index in self.training:
            batch = self.batches[index]
            if batch.extra or batch.decoder:
                continue

            logits = self._logits(batch, self.targets[index])
            again = batch._replace(input_ids=retold(batch, logits, RETOLD_SHARE, generator))
            found.append(len(self.batches))
            self.batches.append(again)
            self.targets.append(self._hidden(again))
            bar.done()
        return found

    def _hidden(self, batch: CalibrationBatch) -> Tensor:
        output = self.body(**self._inputs(batch))
        if not hasattr(output, "last_hidden_state"):
            self.output = BaseModelOutputWithPast
            return hidden_of(output)

        self.output = type(output)
        return output.last_hidden_state

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

    def distance(self, index: int, training: bool = False) -> tuple[Tensor, int]:
        """Summed distance of the model's present output to the original one on micro-batch `index`,
        and its weight.

        training: products of a float32 body are in bfloat16 on a GPU, for a gradient is no worse
        for it; and of an embedding model, part of the hidden states' error is added: a text has
        many of them, and one embedding.
        """
        batch, target = self.batches[index], self.targets[index]
        device = batch.input_ids.device.type
        with torch.autocast(device, torch.bfloat16, enabled=training and device == "cuda"):
            hidden = self._hidden(batch)

        hidden = hidden.to(target.dtype)
        mask = batch.attention_mask.bool()
        if self.embed is not None:
            distance = self._one_minus_cosine(batch, hidden, target)
            if training:
                states = _relative_error(hidden[mask], target[mask])
                distance = distance + STATES_SHARE * len(hidden) * states
            return distance, len(hidden)

        tokens = int(mask.sum())
        if self.kind == "mse":
            return _relative_error(hidden[mask], target[mask]) * tokens, tokens
        return self._kl(batch, hidden, target), tokens

    def _one_minus_cosine(self, batch: CalibrationBatch, hidden: Tensor, target: Tensor) -> Tensor:
        """Summed over the texts: half the squared distance of unit vectors."""
        mine, wanted = (self._unit_embedding(h, batch) for h in (hidden, target))
        return (mine - wanted).pow(2).sum() / 2

    def _kl(self, batch: CalibrationBatch, hidden: Tensor, target: Tensor) -> Tensor:
        """Nats, summed over the tokens."""
        mask = batch.attention_mask.bool()
        full = bool(mask.all())

        def of_tokens(states: Tensor) -> Tensor:
            logits = self._logits(batch, states)
            # without picking where nothing is padding: its gradient sorts, to be the same twice
            return F.log_softmax((logits.flatten(0, 1) if full else logits[mask]).float(), -1)

        with torch.no_grad():
            wanted = of_tokens(target)
        found = of_tokens(hidden)

        return F.kl_div(found, wanted, log_target=True, reduction="sum")

    @torch.no_grad()
    def mean_distance(self, indices: Sequence[int]) -> float:
        """Per token (per text for "cosine"), each with its batch's weight."""
        total = weights = 0.0
        for index in indices:
            distance, count = self.distance(index)
            weight = self.batches[index].weight
            total += weight * float(distance)
            weights += weight * count
        return total / max(1e-9, weights)


def _relative_error(hidden: Tensor, target: Tensor) -> Tensor:
    """‖hidden − target‖² / ‖target‖²"""
    target = target.float()
    return (hidden.float() - target).pow(2).sum() / target.pow(2).sum().clamp(min=1e-30)


def retold(
    batch: CalibrationBatch,
    logits: Tensor,
    share: float,
    generator: torch.Generator,
) -> Tensor:
    """The rows' ids [batch, tokens] with about `share` of them drawn anew, each from what the model
    expects there after the row's own beginning.

    logits: of the original model on the rows, [batch, tokens, vocabulary]. The first token and
    padding stay.
    """
    ids = batch.input_ids
    swap = torch.rand(ids.shape, generator=generator, device=ids.device) < share
    swap[:, 0] = False
    swap &= batch.attention_mask.bool()
    found = ids.clone()

    for row, (old, chosen) in enumerate(zip(logits, swap)):
        places = chosen.nonzero().flatten()
        odds = F.softmax(old[places - 1].float(), -1)
        if len(places):
            found[row, places] = torch.multinomial(odds, 1, generator=generator).flatten()

    return found


def micro_batches(
    batches: Sequence[CalibrationBatch], device: torch.device
) -> list[CalibrationBatch]:
    """The same rows in pieces small enough for a step of training on `device`."""
    pieces = []
    most = _STEP_TOKENS
    if device.type != "cpu":
        tokens = sum(batch.input_ids.numel() for batch in batches)
        most = min(max(most, tokens // _ENOUGH), _GPU_STEP_TOKENS)

    for batch in batches:
        if any(len(tensor) != len(batch.input_ids) for tensor in batch.extra.values()):
            pieces.append(batch)  # patches of images: no telling whose they are
            continue

        rows = min(_STEP_ROWS, max(1, most // batch.input_ids.shape[1]))
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


@contextmanager
def float32_on_cpu(model: nn.Module) -> Iterator[None]:
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
