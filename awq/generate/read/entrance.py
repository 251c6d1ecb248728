"""What enters the first block, norm(factor · embedding + position), and where positions come
from."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from awq.generate.plan import Norm, NotFusable
from awq.generate.read.passes import PIECE, NormCall, Passes, Seen
from awq.nn.norms import read_norm

_PADDING = 3  # tokens on the left, in the pass that tells whether they are counted


@dataclass
class Entrance:
    """x = norm(factor · embedding(ids) + positions[place]).

    positions: [positions, features] or None. counts_padding: transformers' `generate` counts the
    padding on the left of a row as positions.
    """

    factor: float
    positions: Tensor | None
    norm: Norm | None
    counts_padding: bool


def read_entrance(
    passes: Passes,
    embedding: nn.Module,
    everywhere: Seen,
    changed: Seen,
    max_seq_len: int,
) -> Entrance:
    """everywhere: the pass over all positions [pieces, PIECE]; changed: over the first ones, with
    the ids rolled by one. Raises NotFusable."""
    vectors = embedding(passes.ids)[0].float()
    norm = read_outer_norm(everywhere.entrance_norm)
    raw = everywhere.raw
    if vectors.shape != raw.shape[1:]:
        raise NotFusable("the embedding's width is not the blocks'")

    rounding = 4 * torch.finfo(raw.dtype).eps
    factor = _multiple(raw[0].float(), vectors)
    slack = rounding * float(raw[0].float().abs().mean())
    expected = factor * vectors
    if all(
        torch.allclose(part, expected.expand_as(part), rtol=rounding, atol=slack)
        for part in map(Tensor.float, raw.split(64))
    ):
        return Entrance(_one(factor, rounding), None, norm, False)

    if len(raw) > 1 and torch.equal(raw[0], raw[1]):  # the model counts its tokens itself
        tokens = max(max_seq_len, PIECE)
        raw = passes.in_a_row(tokens).raw[:1]
        vectors = vectors.repeat(-(-tokens // PIECE), 1)[:tokens]

    # Positions do not change with the ids, so the difference tells the factor, and the rest is
    # theirs.
    others = changed.raw[0].float()
    first = vectors[:PIECE]
    factor = _multiple(raw[0, :PIECE].float() - others, first - first.roll(1, 0))
    factor = _one(factor, rounding)
    positions = raw.float() - factor * vectors
    if not torch.allclose(
        others - factor * first.roll(1, 0),
        positions[0, :PIECE],
        rtol=rounding,
        atol=4 * slack,
    ):
        raise NotFusable(
            "what enters the blocks is not a multiple of the embedding and a vector for each "
            "position"
        )

    positions = positions.flatten(0, 1)
    padded = _counts_padding(passes, factor * vectors[:PIECE], positions)

    return Entrance(factor, positions, norm, padded)


def _counts_padding(passes: Passes, vectors: Tensor, positions: Tensor) -> bool:
    """Whether a row that is padded on the left begins, in transformers' own `generate`, at the
    position of its first column. vectors: [PIECE, features] without positions."""
    row = passes.generated(_PADDING).raw[1, _PADDING:].float()
    tokens = len(row)
    errors = [
        float((row - vectors[_PADDING:] - positions[start : start + tokens]).norm())
        for start in (0, _PADDING)
    ]
    if min(errors) > 1e-2 * float(row.norm()):
        raise NotFusable("positions of padded rows are not those of their tokens or columns")
    return errors[1] < errors[0]


def read_outer_norm(call: NormCall | None) -> Norm | None:
    """A norm beside the blocks, in float32; None for none. Raises NotFusable for another
    function."""
    if call is None:
        return None

    module = copy.deepcopy(call.module).float()
    x = call.x[:1].float()
    norm = read_norm(module, x, module(x))
    if norm is None:
        raise NotFusable("a norm beside the blocks is of a kind that is not known here")
    return norm


def _multiple(values: Tensor, of: Tensor) -> float:
    """The f that fits values = f · of best."""
    return float((values * of).sum() / of.square().sum().clamp(min=1e-30))


def _one(factor: float, rounding: float) -> float:
    return 1.0 if abs(factor - 1) < rounding else factor
