"""Walking through a model block by block with the inputs that each block gets.

Whoever looks at blocks one at a time walks the same way: the quantizer, `awq folds` and the table
of folds. A walk carries up to three sets of inputs from block to block:

- many-token probes: a few short rows, on which folds are proven;
- one-token probes: rows of a single token, in which attention has nothing to mix, so that a row of
  a value projection can be followed to the channel that it feeds;
- calibration: all the batches, if the caller has any. The caller moves these past a block when it
  is done with it, because a quantizer hands on what the *quantized* block computes.

A model may have several lists that run one after the other: an encoder and its decoder. The second
list's inputs are recorded again when the walk comes to it, with the first as the caller left it, so
that a decoder's cross-attention reads what the quantized encoder gives.

A visited block lies on the work device in float32, whatever the model's dtype: folding in 16 bits
costs accuracy before quantization has begun, and float16 products are a hundred times slower on a
CPU. Afterwards every tensor has its own dtype and device again.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from awq.core.team import ALONE, Named, Team, present_team
from awq.errors import ModelError
from awq.nn.block_calls import BlockCall
from awq.nn.blocks import BlockList, OneBlock, block_names
from awq.nn.decoder_inputs import placeholder_ids, with_decoder_inputs
from awq.nn.hidden import HiddenStates, Room
from awq.nn.memory import release_cached
from awq.nn.presence import BlockStore, Progress
from awq.nn.recording import record_block_calls, record_one_block
from awq.nn.surgery import device_of

logger = logging.getLogger("awq.nn")

PROBE_ROWS = 2
PROBE_TOKENS = 32  # in each row of the many-token probe
ONE_TOKEN_ROWS = 64
# of them, in a call of their own: most guesses of folds are wrong, and so many tokens show it
FIRST_LOOK_ROWS = 4

# arguments and hidden states [batch, tokens, features] of one block, batch by batch
Calls = list[tuple[BlockCall, Tensor]]
ModelInputs = dict[str, Tensor]  # keyword arguments of the model's forward


@dataclass
class BlockInputs:
    """What the blocks of one list read: their arguments, and the hidden states that have come as
    far as the present block.

    calls: [batch][block]. hidden: one tensor [rows, tokens, features] a batch. masks: bool [rows,
    tokens] of real tokens, or
    None when all are. encoder_masks: the same for a decoder's other input, the tokens of its
    encoder; else None.
    """

    calls: list[list[BlockCall]]
    hidden: HiddenStates
    masks: list[Tensor | None]
    encoder_masks: list[Tensor | None]

    def at(self, index: int, device: torch.device) -> Iterator[tuple[BlockCall, Tensor]]:
        """The calls of block `index`, float32 on `device`, one batch at a time: all of them may be
        more than a GPU holds."""
        for number in range(len(self.calls)):
            yield self.call(number, index, device), self.hidden.on(device, number)

    def restore(self, hidden: Sequence[Tensor]) -> None:
        """Takes hidden states of an earlier run, batch by batch."""
        for number, tensor in enumerate(hidden):
            self.hidden[number] = tensor

    def call(self, batch: int, index: int, device: torch.device) -> BlockCall:
        """The arguments of block `index` for one batch, float32 on `device`."""
        return self.calls[batch][index].to(device, torch.float32)

    def advance(
        self,
        block: nn.Module,
        index: int,
        device: torch.device,
        team: Team = ALONE,
    ) -> None:
        """Replaces the hidden states by what the block makes of them. team: divides the batches."""

        def output(number: int) -> Named:
            call = self.call(number, index, device)
            return [("", call.run(block, self.hidden.on(device, number)))]

        for number, made in enumerate(team.each(len(self.calls), output, device)):
            self.hidden[number] = made[0][1]


@dataclass
class BlockVisit:
    """One block in float32 on `device`, and its inputs.

    name: full name in the model; index: place in its list; dtypes: of the block's tensors, by name,
    outside this visit.
    """

    name: str
    block: nn.Module
    index: int
    device: torch.device
    dtypes: dict[str, torch.dtype]
    many: Calls
    single: Calls
    calibration: BlockInputs | None

    def calls(self) -> Iterator[tuple[BlockCall, Tensor]]:
        """The calibration calls of this block, one batch at a time."""
        assert self.calibration is not None
        return self.calibration.at(self.index, self.device)

    def call(self, batch: int) -> tuple[BlockCall, Tensor]:
        """The calibration call of one batch."""
        assert self.calibration is not None
        hidden = self.calibration.hidden.on(self.device, batch)
        return self.calibration.call(batch, self.index, self.device), hidden

    def masks(self) -> list[Tensor | None]:
        """The calibration batches' masks, on the visit's device."""
        assert self.calibration is not None
        return [None if mask is None else mask.to(self.device) for mask in self.calibration.masks]

    def encoder_masks(self) -> list[Tensor | None]:
        """The masks of what a decoder's cross-attention reads, on the visit's device."""
        assert self.calibration is not None
        return [
            None if mask is None else mask.to(self.device)
            for mask in self.calibration.encoder_masks
        ]

    def advance(self) -> None:
        """Moves the calibration inputs past the block as it is now."""
        assert self.calibration is not None
        self.calibration.advance(self.block, self.index, self.device, present_team())


class BlockWalk:
    """Iterates over all blocks of `lists` in order. The first list's inputs are recorded when the
    walk is made.

    lists: in the order in which they run (`reached_lists`).
    inputs: at least one model input with `input_ids` and `attention_mask` [rows, tokens], of which
    the probes are cut.
    calibration: whether all of `inputs` walk along, too. device: where blocks are visited; default:
    where the model is. store: keeps the blocks' weights; None: the model has them.
    finished: number of blocks whose visits have ended, those of an earlier run included.
    Raises ModelError when the model's forward fails on the inputs, or does not call a block.
    """

    def __init__(
        self,
        model: nn.Module,
        lists: Sequence[BlockList],
        inputs: Sequence[ModelInputs],
        calibration: bool = False,
        device: torch.device | None = None,
        store: BlockStore | None = None,
    ) -> None:
        self.model = model
        self.store = store
        self.lists = list(lists)
        self.device = device or device_of(model)
        self._inputs = inputs if calibration else None
        self._probes = probe_inputs(inputs, placeholder_ids(model))
        self._whole = inputs[0]
        self._inputs_of_list = self._record(0)
        self.finished, self._kept = 0, dict[str, Sequence[Tensor]]()

    def go_on(self, progress: Progress) -> None:
        """Begins behind blocks that are finished, with the hidden states of then."""
        self.finished, self._kept = progress.finished, progress.hidden

    @property
    def hidden(self) -> dict[str, Sequence[Tensor]]:
        """The hidden states that go into the next block: of the calibration and of the probes."""
        calibration, many, single = self._inputs_of_list
        found: dict[str, Sequence[Tensor]] = {"many": many.hidden, "single": single.hidden}
        return found if calibration is None else {**found, "calibration": calibration.hidden}

    def _restore(self) -> None:
        for inputs, name in zip(self._inputs_of_list, ("calibration", "many", "single")):
            if inputs is not None:
                inputs.restore(self._kept[name])

    def _record(self, number: int) -> tuple[BlockInputs | None, BlockInputs, BlockInputs]:
        """(calibration, many-token probe, one-token probe) of one list. The lists before it run as
        they are now."""
        lists = self.lists[number:]
        many, single = self._probes

        calibration = None
        if self._inputs is not None:
            room = None if self.store is None else self.store.room
            calibration = _record(self.model, lists, self._inputs, room)

        try:
            probe = _record(self.model, lists, [many])
        except ModelError:  # a tower: text does not reach it
            return (
                calibration,
                _record(self.model, lists, [self._whole]),
                _nothing(),
            )

        return calibration, probe, self._record_single(lists, single)

    def _record_single(self, lists: Sequence[BlockList], single: ModelInputs) -> BlockInputs:
        """Without calls where the model cannot run on single tokens (it pools them): then no fold
        into a linear is found."""
        try:
            return _record(self.model, lists, _parted(single))
        except ModelError as error:
            logger.info("no one-token probes: %s", error)
            return _nothing()

    def __len__(self) -> int:
        """How many blocks are still to be visited."""
        return sum(len(blocks) for _, blocks in self.lists) - self.finished

    def __iter__(self) -> Iterator[BlockVisit]:
        passed = 0
        for number, entry in enumerate(self.lists):
            names, blocks = block_names(entry), entry[1]
            first = min(max(self.finished - passed, 0), len(blocks))
            passed += len(blocks)
            if first == len(blocks):
                continue

            if number > 0:
                self._inputs_of_list = self._record(number)
            if first > 0:
                self._restore()
            calibration, many, single = self._inputs_of_list
            for index, block in enumerate(blocks[first:], first):
                name = names[index]
                with self._present(name, block), in_float32(block, self.device) as dtypes:
                    visit = BlockVisit(
                        name=name,
                        block=block,
                        index=index,
                        device=self.device,
                        dtypes=dtypes,
                        many=list(many.at(index, self.device)),
                        single=list(single.at(index, self.device)),
                        calibration=calibration,
                    )
                    # Before the caller changes the block: probes show the function of the original
                    # model.
                    many.advance(block, index, self.device)
                    single.advance(block, index, self.device)
                    yield visit
                    self.finished += 1

    def _present(self, name: str, block: nn.Module) -> AbstractContextManager[None]:
        return nullcontext() if self.store is None else self.store.visited(name, block)


def probe_inputs(
    inputs: Sequence[ModelInputs], placeholders: Collection[int] = ()
) -> tuple[ModelInputs, ModelInputs]:
    """(many-token probe [PROBE_ROWS, up to PROBE_TOKENS], one-token probe [up to ONE_TOKEN_ROWS,
    1]), without padding, and without tokens that stand for images or sound.

    Of a decoder that reads sound, both keep the sound of their rows.
    """
    if "input_ids" not in inputs[0]:
        return _decoder_probes(inputs[0])

    real = [(item["input_ids"], _real_tokens(item, placeholders)) for item in inputs]
    ids, mask = max(real, key=lambda pair: int(pair[1].sum(1).max()))
    longest_first = mask.sum(1).argsort(descending=True, stable=True)
    rows = longest_first[:PROBE_ROWS]
    ids = ids[rows]
    mask = mask[rows]
    shortest = int(mask.sum(1).min())
    length = max(1, min(PROBE_TOKENS, shortest))
    many = torch.stack([row[keep][:length] for row, keep in zip(ids, mask)])

    tokens = torch.cat([ids[mask] for ids, mask in real[:8]]).unique()
    spread = torch.linspace(
        0, len(tokens) - 1, min(ONE_TOKEN_ROWS, len(tokens)), dtype=torch.float32
    ).long()
    single = tokens[spread.to(tokens.device)].unsqueeze(1)

    return _without_padding(many), _without_padding(single)


def _real_tokens(item: ModelInputs, placeholders: Collection[int]) -> Tensor:
    """bool [rows, tokens]: neither padding nor a placeholder."""
    ids = item["input_ids"]
    known = torch.tensor(sorted(placeholders), dtype=ids.dtype, device=ids.device)
    return item["attention_mask"].bool() & ~torch.isin(ids, known)


def _decoder_probes(item: ModelInputs) -> tuple[ModelInputs, ModelInputs]:
    """A few rows of inputs whose tokens are a decoder's, and the same with one token each."""
    many = {name: tensor[:PROBE_ROWS] for name, tensor in item.items()}
    single = {
        name: tensor[:ONE_TOKEN_ROWS, :1]
        if name.startswith("decoder_")
        else tensor[:ONE_TOKEN_ROWS]
        for name, tensor in item.items()
    }
    return many, single


def _parted(single: ModelInputs) -> list[ModelInputs]:
    """The one-token probe in two: a few rows for a first look, and the others."""
    rows = len(next(iter(single.values())))
    ends = [slice(FIRST_LOOK_ROWS), slice(FIRST_LOOK_ROWS, None)]
    parts = ends if rows > FIRST_LOOK_ROWS else [slice(None)]
    return [{name: tensor[part] for name, tensor in single.items()} for part in parts]


def _without_padding(ids: Tensor) -> ModelInputs:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _nothing() -> BlockInputs:
    """The inputs of no batch."""
    return BlockInputs([], HiddenStates([], torch.device("cpu")), [], [])


def _record(
    model: nn.Module,
    lists: Sequence[BlockList],
    inputs: Sequence[ModelInputs],
    room: Room | None = None,
) -> BlockInputs:
    """The inputs of the first of `lists`. The others do nothing."""
    home = device_of(model)
    items = [with_decoder_inputs(model, item) for item in inputs]
    items = [{k: v.to(home) for k, v in item.items()} for item in items]
    if isinstance(lists[0][1], OneBlock):
        own, hidden = record_one_block(model, block_names(lists[0])[0], items)
        calls = [[call] for call in own]
    else:
        recorded = record_block_calls(model, lists, items)
        calls, hidden = recorded.calls[0], recorded.hidden[0]

    masks, encoder_masks = [], []
    for item, entering in zip(items, hidden):
        mask, decoder_mask = item.get("attention_mask"), item.get("decoder_attention_mask")
        in_decoder = decoder_mask is not None and decoder_mask.shape == entering.shape[:2]
        if in_decoder and mask is not None:
            in_decoder = mask.shape != entering.shape[:2]

        masks.append(_mask(decoder_mask if in_decoder else mask))
        encoder_masks.append(_mask(mask) if in_decoder else None)

    return BlockInputs(calls, HiddenStates(hidden, home, room), masks, encoder_masks)


def _mask(attention_mask: Tensor | None) -> Tensor | None:
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.bool()


@contextmanager
def in_float32(block: nn.Module, device: torch.device) -> Iterator[dict[str, torch.dtype]]:
    """The block's tensors in float32 on `device` for a while; yields their own dtypes by name."""
    home = device_of(block)
    dtypes = {name: tensor.dtype for name, tensor in _tensors(block)}
    if home != device:
        release_cached(device)

    block.to(device)  # in its own dtype, which is half as much to move
    block.to(torch.float32)
    try:
        yield dtypes
    finally:
        block.to(home)
        # each as it was: some models keep norms or tables in float32
        for name, tensor in _tensors(block):
            # Codes of what is packed already are in whatever layout computes now.
            if name in dtypes and tensor.is_floating_point() and tensor.dtype != dtypes[name]:
                tensor.data = tensor.data.to(dtypes[name])


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())
