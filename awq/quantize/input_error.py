"""Asymmetric correction: weights that make up for part of what quantized predecessors changed in a
linear's input.

Error feedback minimises ‖(Ŵ − W) X̂‖ on the inputs X̂ that the linear gets now. The output that it
should give is W X, with the inputs X of the original model (GPTAQ, arXiv 2504.02692; Qronos, arXiv
2505.11695). The part of the difference that is linear in X̂ moves into the target of rounding: W +
α W E Ĝ⁻¹, with E = (X − X̂) X̂ᵀ and Ĝ = X̂ X̂ᵀ. α = 1 follows the calibration tokens fully, and
less of it carries over to other text (measured: docs/notes/quality.md).

Where the output is added to a residual stream, what counts is the sum: the target gives W X and
what the stream lacks, R − R̂, too, so its lack (R − R̂) X̂ᵀ stands beside W E.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from awq.core.team import ALONE, Team, present_team
from awq.nn.block_calls import BlockCall
from awq.nn.hidden import HiddenStates, moved
from awq.nn.hooks import hooked, inputs_of
from awq.nn.surgery import device_of, linear_shape
from awq.quantize.statistics import InputStatistics, add_products, kept_rows
from awq.quantize.streams import Stream

MAX_KEPT_VALUES = 1 << 29  # of inputs that are kept rather than computed again: 2 GiB


class PreparedPair(NamedTuple):
    """What one batch adds to the statistics of an input and its error, before it is multiplied.

    now, error: float32 [n, in], zeros where a token does not count; lack: [n, out], of the stream,
    or empty. counts: int64 [2], tokens that count and dropped ones. The others are sums over rows.
    """

    now: Tensor
    error: Tensor
    lack: Tensor
    counts: Tensor
    sum: Tensor
    error_sum: Tensor
    lack_sum: Tensor


def prepared_pair(
    now: Tensor,
    original: Tensor,
    mask: Tensor | None,
    missing: Tensor | None = None,
) -> PreparedPair:
    """See `InputErrorStatistics.add_pair`."""
    parts = [now, original] if missing is None else [now, original, missing]
    rows, counts = kept_rows([part.float().flatten(0, -2) for part in parts], mask)
    now, error = rows[0], rows[1].sub_(rows[0])
    lack = now.new_empty(0, 0) if missing is None else rows[2]
    return PreparedPair(now, error, lack, counts, now.sum(0), error.sum(0), lack.sum(0))


class InputErrorStatistics(InputStatistics):
    """Sums over tokens of x̂, a linear's input now, and of x, its input in the original model.

    error: float32 [in, in] = Σ (x − x̂) x̂ᵀ; error_sum: float32 [in] = Σ (x − x̂). gram and sum are
    of x̂; |x̂| is not summed. stream, stream_sum: float32 [out, in] = Σ r x̂ᵀ and [out] = Σ r, with
    r what the residual stream lacks beside the linear's output; zero without a stream (`out` is 0
    then).
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device,
        out_features: int = 0,
        team: Team = ALONE,
    ) -> None:
        super().__init__(in_features, device, team)
        self.error = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.error_sum = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.stream = torch.zeros(out_features, in_features, dtype=torch.float32, device=device)
        self.stream_sum = torch.zeros(out_features, dtype=torch.float32, device=device)

    def add_pair(
        self,
        now: Tensor,
        original: Tensor,
        mask: Tensor | None,
        missing: Tensor | None = None,
        weight: float = 1.0,
    ) -> None:
        """Both [batch, tokens, in]; mask: bool [batch, tokens] of real tokens. A token that is not
        finite in either is dropped.

        missing: [batch, tokens, out], what the stream lacks. weight: of each token.
        """
        self.take_pair(prepared_pair(now, original, mask, missing), weight)

    def take_pair(self, batch: PreparedPair, weight: float = 1.0) -> None:
        """Adds a batch. weight: of each of its tokens."""
        self._counts += batch.counts
        self._add_squares(batch.now, weight)
        self.sum.add_(batch.sum, alpha=weight)
        add_products(self.error, batch.error, batch.now, weight, self.team)
        self.error_sum.add_(batch.error_sum, alpha=weight)

        if batch.lack.numel():
            add_products(self.stream, batch.lack, batch.now, weight, self.team)
            self.stream_sum.add_(batch.lack_sum, alpha=weight)

    def complete(self) -> None:
        """See `InputStatistics.complete`."""
        super().complete()
        self.team.total(self.error)
        self.team.total(self.stream)

    @property
    def error_mean(self) -> Tensor:
        """Mean of x − x̂, float32 [in]; missing tokens count as tokens without an error."""
        return self.error_sum / max(1, self.tokens + self.missing_tokens)

    @property
    def centred_error(self) -> Tensor:
        """Σ (x − x̂ − its mean)(x̂ − mean)ᵀ, float32 [in, in]."""
        return torch.addr(self.error, self.error_sum, self.mean, alpha=-1)

    def forget_error(self) -> None:
        """Gives up the sums that only `lack` reads: as much memory as the Gram matrix takes."""
        self.error = self.error.new_empty(0)
        self.stream = self.stream.new_empty(0)

    def lack(self, weight: Tensor, share: float, centred: bool) -> tuple[Tensor, Tensor]:
        """What the outputs W x̂ lack, `share` of it: Σ (wanted − W x̂) x̂ᵀ [out, in], and the mean
        of wanted − W x̂ [out].

        weight: float32 [out, in]. centred: without the means, which a bias makes up for.
        """
        product = weight @ (self.centred_error if centred else self.error)
        mean = weight @ self.error_mean
        if len(self.stream):
            stream = (
                torch.addr(self.stream, self.stream_sum, self.mean, alpha=-1)
                if centred
                else self.stream
            )
            product += stream
            mean += self.stream_sum / max(1, self.tokens + self.missing_tokens)

        return product.mul_(share), mean


class OriginalInputs:
    """What linears of the original block read, batch by batch, while the block beside it is
    quantized.

    One forward notes the inputs of all of them where these fit into memory; else the block is
    copied, and each comes from a forward that stops there. Of several processes, each has only the
    batches of which it is the maker.
    """

    def __init__(
        self,
        block: nn.Module,
        names: Sequence[str],
        calls: Sequence[BlockCall],
        hidden: HiddenStates,
        unused: Collection[int] = (),
        streams: Mapping[str, Stream] | None = None,
    ) -> None:
        """block: as it is before the first of its linears is quantized.

        calls, hidden: arguments and hidden states [rows, tokens, features] of the block, one of
        each a batch, on any device; unused: batches that nobody asks for.
        streams: linear → the stream to which it adds its output; the readers' inputs are noted,
        too.
        """
        self.block, self.names, self.calls, self.hidden = block, names, calls, hidden
        self.streams = streams or {}
        self._kept: dict[int, dict[str, Tensor]] | None = None
        self._outputs: dict[int, Tensor] = {}
        tokens = sum(shape[0] * shape[1] for shape in hidden.shapes)
        width = sum(linear_shape(block.get_submodule(name))[0] for name in names)
        width += sum(linear_shape(block.get_submodule(name))[1] for name in self.streams)
        if tokens * width <= MAX_KEPT_VALUES:
            self._keep(unused)
        if not self.are_kept:
            self.block = deepcopy(block)

    def _keep(self, unused: Collection[int]) -> None:
        kept = {}
        for index in filter(present_team().is_maker, range(len(self.calls))):
            call, hidden = self._call(index)
            readers = [stream.reader for stream in self.streams.values()]
            names = () if index in unused else [*self.names, *readers]
            inputs, output, unchanged = _inputs_and_output(self.block, names, call, hidden)
            if not unchanged:
                # the block overwrites them: they are computed again when they are asked for
                self._outputs = {}
                return
            kept[index], self._outputs[index] = inputs, output

        self._kept = kept

    @property
    def are_kept(self) -> bool:
        return self._kept is not None

    def of(self, names: Sequence[str], batch: int) -> dict[str, Tensor]:
        """The inputs [batch, tokens, in] of linears, or of readers of their streams, by name."""
        if self._kept is not None:
            return self._kept[batch]
        call, hidden = self._call(batch)
        return inputs_of(self.block, names, lambda: call.run(self.block, hidden))

    def outputs(self) -> Iterator[Tensor]:
        """The block's new hidden states, batch by batch."""
        return map(self.output, range(len(self.calls)))

    def output(self, batch: int) -> Tensor:
        """The block's new hidden states of one batch."""
        if self._kept is not None:
            return self._outputs[batch]
        call, hidden = self._call(batch)
        return call.run(self.block, hidden)

    def _call(self, batch: int) -> tuple[BlockCall, Tensor]:
        """One batch, float32 where the block is."""
        device = device_of(self.block)
        return self.calls[batch].to(device, torch.float32), moved(self.hidden[batch], device)


def _inputs_and_output(
    block: nn.Module,
    names: Sequence[str],
    call: BlockCall,
    hidden: Tensor,
) -> tuple[dict[str, Tensor], Tensor, bool]:
    """(inputs of the named linears, output of the block, whether the inputs are still what they
    were when they were read)."""
    inputs: dict[str, Tensor] = {}
    versions: dict[str, int] = {}

    def note(name: str, args: tuple) -> None:
        inputs[name], versions[name] = args[0], args[0]._version

    with hooked(block, dict.fromkeys(names), before=note):
        output = call.run(block, hidden)
    unchanged = all(inputs[name]._version == version for name, version in versions.items())

    return inputs, output, unchanged


def corrected(weight: Tensor, lack: Tensor, order: Tensor, factor: Tensor) -> Tensor:
    """weight + lack · Ĝ⁻¹, float32 [out, in]: the weight whose outputs on x̂ are nearest to those
    that are wanted.

    lack [out, in]: Σ (wanted output − weight · x̂) x̂ᵀ; order [in] and factor [in, in] as
    `feedback_factor` gives them: Ĝ⁻¹ = UᵀU with columns in `order`.
    """
    return weight.index_add(1, order, lack[:, order] @ factor.t() @ factor)
