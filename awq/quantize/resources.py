"""What a streamed quantization needs at its peak, and how long it takes: known from shapes.

Memory is counted step by step, as `awq.quantize.block` goes: in float32 lie the block; a copy of it
while folds are proven; for correction the original's inputs, or another copy that gives them; one
Gram matrix for each distinct input; and what a step makes of the widest group of linears. The
largest sum is the peak.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from awq.config import AwqConfig
from awq.core.ranges import SHRINK
from awq.core.refinement import SYSTEMS
from awq.core.scales import RATIOS
from awq.nn.block_calls import BlockCall
from awq.nn.hooks import hooked
from awq.nn.surgery import linear_shape, named_linears
from awq.quantize.group import rounded_rows
from awq.quantize.input_error import MAX_KEPT_VALUES
from awq.quantize.options import QuantizeOptions
from awq.quantize.plan import Plan

FLOAT = 4  # bytes
# of the rows that are rounded at once, among the intermediate results: nearest, and with feedback
_COPIES, _FEEDBACK_COPIES = 2.25, 5
_SYSTEM_BYTES = FLOAT + 2 * 8  # an entry of the systems of new scales, in float32 and float64 twice
_PROBE = 1024  # rows and columns of the products that are timed
_PROBES = 4


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read one input: its features, the outputs of each, and how many scales a row
    has."""

    inputs: int
    outputs: tuple[int, ...]
    scales: int

    @property
    def bytes(self) -> int:
        """Of the weights as rows of one, float32."""
        return FLOAT * self.inputs * sum(self.outputs)

    @property
    def stacked(self) -> int:
        """Of the copy in which they are rows of one; a single linear needs none."""
        return self.bytes if len(self.outputs) > 1 else 0

    @property
    def gram(self) -> int:
        return FLOAT * self.inputs**2


@dataclass(frozen=True)
class BlockShape:
    """A block as a cost: numbers in all of its tensors, bytes of them in the files, and its groups
    in the order of their calls."""

    numbers: int
    stored: int
    groups: tuple[LinearGroup, ...]


@dataclass(frozen=True)
class Work:
    """What is calibrated on: tokens in all, tokens in the largest batch, features of the hidden
    states."""

    tokens: int
    batch_tokens: int
    features: int


def block_shape(
    name: str,
    block: nn.Module,
    plan: Plan,
    config: AwqConfig,
    call: BlockCall | None,
    hidden: Tensor | None,
) -> BlockShape:
    """Of a block that may stand on the meta device. call, hidden: how it is called; linears that
    read the same tensor form a group. Linears that the call does not reach form one each."""
    targets = [n for n in named_linears(block) if f"{name}.{n}" in plan.targets]
    tensors = [*block.parameters(), *block.buffers()]

    members: dict[object, list[str]] = {}
    seen = set()
    for inner, read in _inputs_read(block, targets, call, hidden):
        if inner not in seen:
            members.setdefault(read, []).append(inner)
            seen.add(inner)

    for inner in targets:
        if inner not in seen:
            members[inner] = [inner]

    groups = []
    for names in members.values():
        shapes = [linear_shape(block.get_submodule(inner)) for inner in names]
        inputs = shapes[0][0]
        scales = inputs // config.group_size_of(inputs, names[0])
        groups.append(LinearGroup(inputs, tuple(outputs for _, outputs in shapes), scales))

    stored = sum(tensor.nbytes for tensor in tensors)
    return BlockShape(sum(tensor.numel() for tensor in tensors), stored, tuple(groups))


def _inputs_read(
    block: nn.Module,
    names: Sequence[str],
    call: BlockCall | None,
    hidden: Tensor | None,
) -> list[tuple[str, object]]:
    """(linear, what identifies its input) in the order of the calls; nothing where the block cannot
    run without values."""
    if call is None or hidden is None:
        return []

    seen: list[tuple[str, Tensor]] = []
    meta = torch.device("meta")

    def note(name: str, args: tuple) -> None:
        seen.append((name, args[0]))

    try:
        with torch.no_grad(), hooked(block, names, before=note):
            call.to(meta).run(block, hidden.to(meta))
    except Exception:  # routing by values has none
        return []

    return [(name, id(tensor)) for name, tensor in seen]


def block_peak(shape: BlockShape, work: Work, options: QuantizeOptions, kind: str) -> int:
    """Bytes at the peak of one block on its work device, hidden states left out.

    kind: of the device.
    """
    block = FLOAT * shape.numbers
    grams = sum(group.gram for group in shape.groups)
    widest = max(group.bytes for group in shape.groups)
    activations = FLOAT * work.batch_tokens * _widest_features(shape)
    half = 0 if kind == "cpu" else 2  # bytes: a kernel reads the Gram matrix in 16 bits
    search = max(group.stacked + 2 * group.bytes + half * group.inputs**2 for group in shape.groups)
    steps = [
        block + (shape.stored if shape.stored < block else 0),  # float32 stays where it is
        2 * block,  # a copy proves folds
        block + grams + activations,
        block + grams + search,
        block + grams + _nearest(widest),
    ]
    steps += _rounding_steps(shape, work, options, kind)

    return max(steps)


def _widest_features(shape: BlockShape) -> int:
    """Features of what lives at once in a forward: a group's input, and its outputs."""
    return max(group.inputs + sum(group.outputs) for group in shape.groups)


def _nearest(size: int) -> int:
    """Of the intermediate results of rounding to nearest."""
    return 2 * size + size // FLOAT


def _rounding_steps(
    shape: BlockShape,
    work: Work,
    options: QuantizeOptions,
    kind: str,
) -> list[int]:
    """Bytes while each group is rounded, in their order. Statistics of those before it are gone."""
    feedback = options.rounding == "feedback"
    corrected = corrects(options)
    held = FLOAT * shape.numbers
    if corrected:
        held += _original_inputs(shape, work)

    steps = []
    for number, group in enumerate(shape.groups):
        base = held + sum(later.gram for later in shape.groups[number:])
        base += sum(earlier.bytes // FLOAT for earlier in shape.groups[:number])  # their codes
        chunk = FLOAT * group.inputs * rounded_rows(sum(group.outputs), group.inputs, kind)
        copies = _FEEDBACK_COPIES if feedback else _COPIES
        rows = group.stacked + round(copies * chunk) + group.bytes // FLOAT

        if corrected:
            steps.append(base + group.gram + group.bytes)  # sums of the error, and of the stream
            base += group.bytes  # what the outputs lack

        if feedback:
            base += group.gram  # the factor
            steps.append(base + group.gram + group.stacked)  # panels in float64, half of them zeros

        if options.refinement:
            entries = SYSTEMS["cpu" if kind == "cpu" else "cuda"]
            rows += _SYSTEM_BYTES * min(entries, sum(group.outputs) * group.scales**2)

        steps.append(base + rows)

    return steps


def corrects(options: QuantizeOptions) -> bool:
    """Whether codes make up for the error of their inputs."""
    return bool(options.correction) and options.rounding == "feedback"


def _original_inputs(shape: BlockShape, work: Work) -> int:
    """Bytes of the original block's inputs and outputs, or of the block's copy that gives them."""
    inputs = work.tokens * sum(group.inputs for group in shape.groups)
    if inputs > MAX_KEPT_VALUES:
        return FLOAT * shape.numbers
    return FLOAT * (inputs + work.tokens * work.features)


def activation_bytes(work: Work, options: QuantizeOptions) -> int:
    """Of the hidden states between two blocks, those of the original model included."""
    return FLOAT * work.tokens * work.features * (2 if corrects(options) else 1)


def block_seconds(
    shape: BlockShape,
    work: Work,
    options: QuantizeOptions,
    rates: tuple[float, float],
) -> float:
    """Seconds on one block without reading and writing. rates: of `measured_rates`."""
    corrected = corrects(options)
    passes = 5 + 2 * len(shape.groups) if corrected else 2
    grams = 3 if corrected else 1
    candidates = 2 * len(RATIOS) if options.scaling else 0
    ranges = len(SHRINK) ** 2 if options.clip else 0
    products = 2.0 * work.tokens * shape.numbers * passes

    roundings = 0.0
    for group in shape.groups:
        weights = group.inputs * sum(group.outputs)
        products += 2.0 * work.tokens * group.inputs**2 * grams
        products += 1.2 * weights * group.inputs * (candidates + 4)
        roundings += weights * (candidates + ranges)

        if options.rounding == "feedback":
            products += 1.4 * group.inputs**3
            products += 8.0 * weights * group.inputs

    return products / rates[0] + roundings / rates[1]


@torch.no_grad()
def measured_rates(device: torch.device) -> tuple[float, float]:
    """(operations of a float32 product, weights rounded to nearest) a second on this device: the
    median of a few tries, a fraction of a second."""
    from awq.core.weight import round_to_nearest

    weight = torch.randn(_PROBE, _PROBE, dtype=torch.float32, device=device)

    def seconds(act) -> float:
        times = []
        for _ in range(_PROBES):
            start = time.perf_counter()
            float(act())  # a GPU is waited for
            times.append(time.perf_counter() - start)
        return sorted(times)[_PROBES // 2]

    product = seconds(lambda: (weight @ weight)[0, 0])
    nearest = seconds(lambda: round_to_nearest(weight, _PROBE).dequantize()[0, 0])

    return 2.0 * _PROBE**3 / product, _PROBE**2 / nearest
