"""Streaming statistics of linear inputs: one Gram matrix and the means of x and |x| per input,
never the inputs themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from awq.core.team import ALONE, Team
from awq.nn.hooks import hooked
from awq.nn.sorted_products import watched_rows

PANEL = 2048  # rows of a sum of products that are summed at once
# Of a Gram matrix on a CPU, whose narrow products are as fast as wide ones: less of what lies below
# the diagonal is computed.
NARROW_PANEL = 256
TOKENS_PER_CHANNEL = 4  # that a Gram matrix should stand for
# larger ones' squares, summed over some million tokens, are more than float32 holds
MAX_ACTIVATION = 1e16
SHRINKAGE = 1 / 9  # pseudo-tokens for each true one, however many there are: a tenth of the whole
_RELIABLE_TOKENS = 16  # from which a channel's own energy outweighs the mean of all


class Prepared(NamedTuple):
    """What one batch adds to the statistics of an input, before it is multiplied.

    rows: float32 [n, in], zeros where a token does not count. counts: int64 [2], tokens that count
    and dropped ones. sum, abs_sum: float32 [in], of the rows.
    """

    rows: Tensor
    counts: Tensor
    sum: Tensor
    abs_sum: Tensor


def prepared(x: Tensor, mask: Tensor | None) -> Prepared:
    """x: [..., in]; mask: bool [batch, tokens] of real tokens. Rows that cannot be summed are
    dropped and counted."""
    (rows,), counts = kept_rows([x.detach().float().reshape(-1, x.shape[-1])], mask)
    return Prepared(rows, counts, rows.sum(0), rows.abs().sum(0))


def kept_rows(parts: Sequence[Tensor], mask: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Copies of parts [n, any] with zeros in the rows that do not count, and how many rows count
    and are dropped: int64 [2].

    A row counts when it does in all parts.
    """
    fits = [(part.abs() <= MAX_ACTIVATION).all(-1) for part in parts]  # no NaN is
    usable = keep = torch.stack(fits).all(0)
    if mask is not None and mask.numel() == len(keep):
        keep = usable & mask.reshape(-1)
        usable = usable | ~mask.reshape(-1)

    counts = torch.stack([keep.sum(), (~usable).sum()])
    return [part.where(keep.unsqueeze(-1), 0.0) for part in parts], counts


class InputStatistics:
    """Sums over tokens of one input. gram: float32 [in, in] = Σ x xᵀ; sum, abs_sum: float32 [in].

    team: the processes that divide the Gram matrix; `complete` must be called when all tokens are
    added.
    tokens: how many were added; dropped: how many were not finite or above `MAX_ACTIVATION`;
    pseudo_tokens: how many `shrink_to_diagonal` added; calls: of the linear.
    """

    def __init__(self, in_features: int, device: torch.device, team: Team = ALONE) -> None:
        self.team = team
        self.gram = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.sum = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.abs_sum = torch.zeros(in_features, dtype=torch.float32, device=device)

        # read at the end: a GPU would be waited for
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)
        self.pseudo_tokens = 0
        self.calls = 0

    def add(self, x: Tensor, mask: Tensor | None, weight: float = 1.0) -> None:
        """x: [..., in]; mask: bool [batch, tokens] of real tokens; weight: of each of them. Rows
        that cannot be summed are dropped and counted."""
        self.take(prepared(x, mask), weight)

    def take(self, batch: Prepared, weight: float = 1.0) -> None:
        """Adds a batch. weight: of each of its tokens."""
        self._counts += batch.counts
        self._add_squares(batch.rows, weight)
        self.sum.add_(batch.sum, alpha=weight)
        self.abs_sum.add_(batch.abs_sum, alpha=weight)
        self.calls += 1

    def _add_squares(self, rows: Tensor, weight: float) -> None:
        """Adds rowsᵀ rows to the Gram matrix, without most of what lies below its diagonal."""
        add_products(self.gram, rows, rows, weight, self.team, symmetric=True)

    def complete(self) -> None:
        """Joins the pieces of the processes, and fills in what lies below the diagonal."""
        self.team.total(self.gram)
        rows = _panel_rows(self.gram, symmetric=True)
        for start in range(0, len(self.gram), rows):
            stop = start + rows
            self.gram[stop:, start:stop] = self.gram[start:stop, stop:].t()

    @property
    def tokens(self) -> int:
        return int(self._counts[0])

    @property
    def dropped(self) -> int:
        return int(self._counts[1])

    def divide_by(self, scale: Tensor) -> None:
        """Makes them the statistics of x / scale, as a linear behind a folded scale [in] meets
        it."""
        self.gram.div_(scale).div_(scale.unsqueeze(-1))
        self.sum.div_(scale)
        self.abs_sum.div_(scale)

    def shrink_to_diagonal(self) -> None:
        """Adds pseudo-tokens with independent channels: a share of the true ones, and up to
        TOKENS_PER_CHANNEL per channel.

        Few tokens leave directions in which no error is seen, and codes chosen for them are far
        worse than the nearest ones on any other text; and any text leaves directions that another
        one uses. The channels' means and energies come from the tokens there are, drawn towards 0
        and towards the mean energy when those are few.
        """
        if self.tokens == 0:
            return

        count = max(self.missing_tokens, round(SHRINKAGE * self.tokens))
        trust = self.tokens / (self.tokens + _RELIABLE_TOKENS) if self.missing_tokens else 1.0
        mean = trust * self.mean
        energy = self.gram.diagonal() / self.tokens
        energy = energy * trust + energy.mean() * (1 - trust)
        self.gram.addr_(mean, mean, alpha=count)
        self.gram.diagonal().add_((energy - mean**2).clamp_(min=0), alpha=count)
        self.sum += count * mean
        self.pseudo_tokens = count

    @property
    def missing_tokens(self) -> int:
        """How many tokens there are too few for TOKENS_PER_CHANNEL."""
        return max(0, TOKENS_PER_CHANNEL * len(self.gram) - self.tokens)

    @property
    def mean(self) -> Tensor:
        """Of x, float32 [in], pseudo-tokens included."""
        return self.sum / max(1, self.tokens + self.pseudo_tokens)

    @property
    def abs_mean(self) -> Tensor:
        """Of |x|, float32 [in], over true tokens."""
        return self.abs_sum / max(1, self.tokens)

    @property
    def centred_gram(self) -> Tensor:
        """Σ (x − mean)(x − mean)ᵀ, float32 [in, in]: what is left of the error when a bias makes up
        for its mean."""
        gram = torch.addr(
            self.gram, self.sum, self.sum, alpha=-1 / max(1, self.tokens + self.pseudo_tokens)
        )
        gram.diagonal().clamp_(min=0)  # a constant channel's difference of two equal numbers
        return gram


def add_products(
    total: Tensor,
    left: Tensor,
    right: Tensor,
    weight: float,
    team: Team = ALONE,
    symmetric: bool = False,
) -> None:
    """total [a, b] += weight · leftᵀ right for left [n, a] and right [n, b], panel by panel of some
    rows, and of these only the process's own.

    symmetric: what lies left of a panel's own columns is left out, which is half of the work.
    """
    rows = _panel_rows(total, symmetric)
    for number, start in enumerate(range(0, len(total), rows)):
        if team.has(number):
            first = start if symmetric else 0
            panel = left[:, start : start + rows].t()
            total[start : start + rows, first:].addmm_(panel, right[:, first:], alpha=weight)


def _panel_rows(total: Tensor, symmetric: bool) -> int:
    """Rows of a panel, however many processes divide them."""
    return NARROW_PANEL if symmetric and total.device.type == "cpu" else PANEL


class MaskHolder:
    """The token masks of the batch that is running; hooks read them. encoder: of the other input of
    a decoder's blocks. weight: of the batch's tokens. rows: (their mask,) while an expert reads
    rows that were sorted by expert."""

    mask: Tensor | None = None
    encoder: Tensor | None = None
    weight: float = 1.0
    rows: tuple[Tensor | None] | None = None

    def of(self, x: Tensor) -> Tensor | None:
        """The mask of an input [batch, tokens, in]: the encoder's where that alone has its number
        of tokens."""
        if self.rows is not None:
            return self.rows[0]
        return fitting_mask(x, self.mask, self.encoder)


def fitting_mask(x: Tensor, mask: Tensor | None, encoder: Tensor | None) -> Tensor | None:
    """Of a block's mask and its encoder's, bool [batch, tokens] or None, the one for x [batch,
    tokens, in]."""
    if encoder is not None and x.shape[:-1] == encoder.shape:
        return encoder
    return mask


@contextmanager
def collect_inputs(
    block: nn.Module,
    names: Iterable[str],
    holder: MaskHolder,
) -> Iterator[dict[str, InputStatistics]]:
    """While open, every forward of `block` adds the inputs of the named linears to the yielded
    statistics."""
    statistics: dict[str, InputStatistics] = {}

    def add(name: str, args: tuple) -> None:
        x = args[0]
        if name not in statistics:
            statistics[name] = InputStatistics(x.shape[-1], x.device)
        statistics[name].add(x, holder.of(x), holder.weight)

    def read_rows(mask: Tensor | None) -> None:
        holder.rows = (mask,)

    def all_read() -> None:
        holder.rows = None

    with (
        hooked(block, names, before=add),
        watched_rows(block, lambda: holder.mask, read_rows, all_read),
    ):
        yield statistics


@contextmanager
def prepared_inputs(
    block: nn.Module,
    names: Iterable[str],
    mask_of: Callable[[Tensor], Tensor | None],
) -> Iterator[list[tuple[str, Prepared]]]:
    """While open, every forward of `block` appends what the inputs of the named linears add to
    their statistics to the yielded list. mask_of: the mask of an input."""
    made: list[tuple[str, Prepared]] = []

    def prepare(name: str, args: tuple) -> None:
        made.append((name, prepared(args[0], mask_of(args[0]))))

    with hooked(block, names, before=prepare):
        yield made
