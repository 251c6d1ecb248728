"""A whole encoder as one native program: token ids in, sentence embeddings out, no framework
operator in between.

Texts are packed one after the other without padding; `starts` says where each begins. The program
is a list of phases, each of them a number of independent items. Workers take items until none is
left, then the next phase begins:

    phase            what                                                        one item
    embed            word + position + type, norm, integers                      a token
    for each layer:
      qkv            product of integers and nibbles, plus bias                  32 outputs
      attend         softmax(q · kᵀ · scaling + bias) · v                        a head of a text
      quantize       context to integers                                         a token
      o              product                                                     32 outputs
      add_norm       hidden + branch, norm, integers                             a token
      up             product; gate and up follow each other where MLPs are gated 32 outputs
      activate       activation, integers                                        a token
      down           product                                                     32 outputs
      add_norm       as above, with the next layer's norm where norms come first a token
    pool             mean, first or last token of a text, norm 1                 a text

An item's result does not depend on who computes it, so any number of workers gives the same bits.
Everything that is the same for all texts (`EncoderSpec`) is a constant of the machine code. The
arithmetic is float32, but for the products: see `products`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir

from awq.kernels.cpu.emit import Emitter
from awq.kernels.cpu.ir_types import F16, F32, I8, I32, I64, LANES, PTR, vec
from awq.kernels.cpu.maths import larger, nearest_int, quick_activation, quick_exp
from awq.kernels.cpu.targets import Target
from awq.kernels.cpu.task import COUNT, ELEMENT, Array, Reader, Task
from awq.kernels.cpu.values import Pointer, Value, Variable

LINEARS = ("qkv", "o", "up", "down")
PHASES_PER_LAYER = 9
COUNTERS_PER_PHASE = 8  # int64, one cache line: items taken, taken from the back, done
BLOCK = LANES  # outputs of a block of the layout rows16
PAIR = 2 * BLOCK  # outputs of an item of a product
PIECE_TOKENS = 64  # of an item of a product
QUERIES = 8  # that share one pass over the keys
SPINS_BEFORE_YIELD = 2000
NO_WINDOW = 1 << 30


class EncoderSpec(NamedTuple):
    """What is the same for every text. Widths in features; `planes`: int8 digits of an activation,
    1 or 2.

    pre_norm: norms come before attention and MLP instead of after the residual sum. post_norms:
    what attention and MLP give is normed before it is added. words_factor: what rows of the
    embedding table are multiplied by. pooling: mean, cls or lasttoken.
    """

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    layers: int
    group: int
    planes: int
    eps: float
    scaling: float
    activation: str
    gated: bool
    centered: bool
    pre_norm: bool
    post_norms: bool
    words_factor: float
    embedding_norm: bool
    rotary: int
    relative: bool
    causal: bool
    windowed: bool
    qk_norm: bool
    qk_eps: float
    pooling: str
    normalize: bool

    @property
    def channels(self) -> int:
        """Outputs of the joined product of q, k and v."""
        return (self.heads + 2 * self.kv_heads) * self.dim

    @property
    def context(self) -> int:
        return self.heads * self.dim

    @property
    def phases(self) -> int:
        return 2 + PHASES_PER_LAYER * self.layers


def _linear_fields(name: str) -> dict[str, Array]:
    return {
        f"{name}_codes": Array(I8),
        f"{name}_scales": Array(F16),
        f"{name}_zeros": Array(I8),
        f"{name}_bias": Array(F32),
    }


# Weights of one layer. The norms are those that follow attention and MLP, wherever the model itself
# says that they belong.
LAYER = Task(
    **_linear_fields("qkv"),
    **_linear_fields("o"),
    **_linear_fields("up"),
    **_linear_fields("down"),
    norm1_weight=Array(F32),
    norm1_bias=Array(F32),
    norm2_weight=Array(F32),
    norm2_bias=Array(F32),
    post1_weight=Array(F32),
    post1_bias=Array(F32),
    post2_weight=Array(F32),
    post2_bias=Array(F32),
    q_norm=Array(F32),
    k_norm=Array(F32),
    cos=Array(F32),
    sin=Array(F32),
    relative=Array(F32),
    window=COUNT,
    keep_norm2=COUNT,
)
LAYER_FIELDS = len(LAYER.fields)

JOB = Task(
    counters=Array(I64),
    workers=COUNT,
    layers=Array(I64),
    tokens=COUNT,
    texts=COUNT,
    ids=Array(I32),
    positions=Array(I32),
    types=Array(I32),
    starts=Array(I32),
    words=Array(ELEMENT),
    position_table=Array(F32),
    type_table=Array(F32),
    norm_weight=Array(F32),
    norm_bias=Array(F32),
    first_norm_weight=Array(F32),
    first_norm_bias=Array(F32),
    hidden=Array(F32),
    planes=Array(I8),
    steps=Array(F32),
    sums=Array(F32),
    wide=Array(F32),
    branch=Array(F32),
    context=Array(F32),
    scratch=Array(F32),
    scratch_values=COUNT,
    max_distance=COUNT,
    prompt_tokens=COUNT,
    out=Array(F32),
)

_Item = Callable[["_Phase", Value], None]


class _Phase(NamedTuple):
    """What an item's emitter works with. t: the job; layer: the layer's weights; worker: who
    computes, from 0."""

    b: Emitter
    t: Reader
    layer: Reader
    worker: Value
    spec: EncoderSpec


def emit_encoder(
    module: ir.Module, element: ir.Type, target: Target, spec: EncoderSpec
) -> list[ir.Function]:
    """forward(job, worker), and serve(pool) and call(pool, job) for its threads."""
    forward = _emit_forward(module, element, target, spec)
    return [forward, _emit_serve(module, forward), _emit_call(module, forward)]


def _emit_forward(
    module: ir.Module, element: ir.Type, target: Target, spec: EncoderSpec
) -> ir.Function:
    tiles = _emit_tiles(module, target, spec)

    def define(name: str, item: _Item) -> ir.Function:
        b, (job, layer, worker, index) = Emitter.define(
            module, name, [PTR, PTR, I64, I64], internal=True
        )
        t = JOB.reader(b, job, element)
        item(_Phase(b, t, LAYER.reader(b, layer, element), worker, spec), index)
        return b.finish()

    def product(name: str, inputs: int, outputs: int, output: str) -> ir.Function:
        return define(
            name, lambda p, index: _product(p, index, tiles, name, inputs, outputs, output)
        )

    inner_channels = spec.inner * (2 if spec.gated else 1)
    embed = define("embed", _embed)
    pool = define("pool", _pool)
    layer_phases: tuple[tuple[ir.Function, Any], ...] = (
        (product("qkv", spec.hidden, spec.channels, "wide"), spec.channels),
        (define("attend", _attend), "heads"),
        (define("quantize_context", _quantize_context), "tokens"),
        (product("o", spec.context, spec.hidden, "branch"), spec.hidden),
        (define("add_norm1", lambda p, index: _add_norm(p, index, 1)), "tokens"),
        (product("up", spec.hidden, inner_channels, "wide"), inner_channels),
        (define("activate", _activate), "tokens"),
        (product("down", spec.inner, spec.hidden, "branch"), spec.hidden),
        (define("add_norm2", lambda p, index: _add_norm(p, index, 2)), "tokens"),
    )

    b, (job, worker) = Emitter.define(module, "forward", [PTR, I64])
    t = JOB.reader(b, job, element)
    counters, layers, workers = t.counters, t.layers, t.workers
    tokens, texts = t.tokens, t.texts
    pieces = (tokens + (PIECE_TOKENS - 1)) // PIECE_TOKENS
    sizes = {"tokens": tokens, "heads": texts * spec.heads}

    def run(function: ir.Function, items: Value, phase: Value, layer: Pointer) -> None:
        _run_phase(
            b, function, items, counters + phase * COUNTERS_PER_PHASE, job, layer, worker, workers
        )

    run(embed, tokens, b.const(I64, 0), layers)
    with b.loop(0, spec.layers) as n:
        layer = layers + n * LAYER_FIELDS
        for i, (function, size) in enumerate(layer_phases):
            items = sizes[size] if isinstance(size, str) else pieces * -(-size // PAIR)
            run(function, items, n * PHASES_PER_LAYER + (i + 1), layer)
    run(pool, texts, b.const(I64, spec.phases - 1), layers)
    return b.finish()


# Phases and workers


def _run_phase(
    b: Emitter,
    function: ir.Function,
    items: Value,
    counters: Pointer,
    job: Pointer,
    layer: Pointer,
    worker: Value,
    workers: Value,
) -> None:
    """All items of a phase. Worker 0 takes them from the front, the others from the back: each
    meets the same weights again in the next call, and finds them in its own cache."""
    with b.builder.if_else(workers.equals(1).ir) as (alone, together):
        with alone, b.loop(0, items) as item:
            b.call(function, [job, layer, worker, item])
        with together:
            front = b.variable(I64, 0)
            with _endless(b) as leave:
                leave(b.fetch_add(counters, 1) >= items)
                chosen = b.variable(I64, 0)
                with b.builder.if_else(worker.equals(0).ir) as (first, other):
                    with first:
                        chosen.value = front.value
                        front.value = front.value + 1
                    with other:
                        chosen.value = items - 1 - b.fetch_add(counters + 1, 1)
                b.call(function, [job, layer, worker, chosen.value])
                b.fetch_add(counters + 2, 1)
            _wait(b, counters + 2, items)


class _endless:
    """`while True:` whose body leaves it with `leave(condition)`."""

    def __init__(self, b: Emitter) -> None:
        self._b = b

    def __enter__(self) -> Callable[[Value], None]:
        builder = self._b.builder
        self._body = builder.append_basic_block("again")
        self._end = builder.append_basic_block("left")
        builder.branch(self._body)
        builder.position_at_end(self._body)
        return self._leave

    def _leave(self, condition: Value) -> None:
        builder = self._b.builder
        on = builder.append_basic_block("on")
        builder.cbranch(condition.ir, self._end, on)
        builder.position_at_end(on)

    def __exit__(self, *_error: object) -> None:
        self._b.builder.branch(self._body)
        self._b.builder.position_at_end(self._end)


def _wait(b: Emitter, counter: Pointer, value: Value) -> None:
    """Until a counter has reached a value: a short spin, then the core is offered to others again
    and again."""
    spins = b.variable(I64, 0)
    give_way = b.declared("sched_yield", I32, [])
    with _endless(b) as leave:
        leave(b.atomic_load(counter) >= value)
        spins.value = spins.value + 1
        b.pause()
        with b.when(spins.value > SPINS_BEFORE_YIELD):
            b.builder.call(give_way, [])


# A pool is int64s: the job, tickets for helpers, helpers that came back, whether to stop; then a
# semaphore.
POOL_JOB, POOL_TICKETS, POOL_BACK, POOL_STOP, POOL_SEMAPHORE = 0, 8, 16, 17, 24
POOL_FIELDS = 40


def _emit_serve(module: ir.Module, forward: ir.Function) -> ir.Function:
    """serve(pool): a helper's life. It sleeps until it is called, and takes a ticket or sleeps
    on."""
    b, (pool,) = Emitter.define(module, "serve", [PTR])
    sleep = b.declared("sem_wait", I32, [PTR])
    with _endless(b) as leave:
        b.builder.call(sleep, [(pool + POOL_SEMAPHORE).ir])
        leave(b.atomic_load(pool + POOL_STOP).differs(0))
        ticket = b.atomic_load(pool + POOL_TICKETS)
        with (
            b.when(ticket > 0),
            b.when(b.compare_and_swap(pool + POOL_TICKETS, ticket, ticket - 1)),
        ):
            job = b.pointer(pool[POOL_JOB], I64)
            b.call(forward, [job, ticket])
            b.fetch_add(pool + POOL_BACK, 1)
    return b.finish()


def _emit_call(module: ir.Module, forward: ir.Function) -> ir.Function:
    """call(pool, job, helpers): the job, by the caller and as many helpers as come in time."""
    b, (pool, job, helpers) = Emitter.define(module, "call", [PTR, PTR, I64])
    wake = b.declared("sem_post", I32, [PTR])
    pool[POOL_JOB] = b.address(job)
    pool[POOL_BACK] = b.const(I64, 0)
    b.swap(pool + POOL_TICKETS, helpers)
    with b.loop(0, helpers):
        b.builder.call(wake, [(pool + POOL_SEMAPHORE).ir])
    b.call(forward, [job, b.const(I64, 0)])
    left = b.swap(pool + POOL_TICKETS, b.const(I64, 0))
    _wait(b, pool + POOL_BACK, helpers - left)
    return b.finish()


# Products


def _emit_tiles(
    module: ir.Module, target: Target, spec: EncoderSpec
) -> dict[tuple[int, int], ir.Function]:
    widths = [w for w in (8, 4, 2, 1) if 2 * w * spec.planes <= target.sums]
    return {(rows, w): _emit_tile(module, target, spec, rows, w) for rows in (2, 1) for w in widths}


def _emit_tile(
    module: ir.Module, target: Target, spec: EncoderSpec, rows: int, tokens: int
) -> ir.Function:
    """tile(codes, scales, zeros, bias, planes, steps, sums, y, inputs, outputs): `rows` blocks ×
    `tokens` tokens.

    Every pointer is that of the first block or token. Inputs are a multiple of the group.
    """
    name, group, planes = f"tile_{rows}x{tokens}", spec.group, spec.planes
    b, arguments = Emitter.define(module, name, [PTR] * 8 + [I64, I64], internal=True)
    codes, scales, zeros, bias, data, steps, sums, y = (
        b.as_type(pointer, kind)
        for pointer, kind in zip(arguments, (I8, F16, I8, F32, I8, F32, F32, F32))
    )
    inputs, outputs = arguments[8:]
    groups = inputs // group
    lines = [codes + inputs * (r * BLOCK // 2) for r in range(rows)]
    digits = [[data + inputs * (i * planes + p) for p in range(planes)] for i in range(tokens)]
    totals: dict[tuple[int, int], Variable] = {}
    integers: dict[tuple[int, int, int], Variable] = {}
    for r in range(rows):
        offset = bias.vector(r * BLOCK, LANES)
        for i in range(tokens):
            totals[r, i] = b.variable(vec(F32), offset)
            for p in range(planes):
                integers[r, i, p] = b.variable(vec(I32), 0)
    with b.loop(0, groups) as g:
        grids = [(groups * r + g) * BLOCK for r in range(rows)]
        for variable in integers.values():
            variable.value = b.const(vec(I32), 0)
        start = g * group
        with b.loop(start, start + group, 8) as k:
            for r in range(rows):
                word = lines[r].vector(k * (BLOCK // 2), 4 * LANES)
                for half, nibbles in enumerate((word & 15, word.shift_right(4))):
                    for i in range(tokens):
                        for p in range(planes):
                            four = (digits[i][p] + (k + 4 * half)).load_as(I32)
                            values = b.bitcast(b.splat(four), vec(I8, 4 * LANES))
                            place = integers[r, i, p]
                            place.value = target.dot(b, place.value, nibbles, values)
        for r in range(rows):
            scale = b.to_float(scales.vector(grids[r], LANES))
            zero = b.unsigned_to_float(zeros.vector(grids[r], LANES), vec(F32))
            for i in range(tokens):
                place = groups * i + g
                step, sum = b.splat(steps[place]), b.splat(sums[place])
                whole = integers[r, i, 0].value
                for p in range(1, planes):
                    whole = (whole << 8) + integers[r, i, p].value
                value = b.fma(-zero, sum, b.signed_to_float(whole, vec(F32)))
                totals[r, i].value = b.fma(value, scale * step, totals[r, i].value)
    for (r, i), total in totals.items():
        (y + outputs * i)[r * BLOCK] = total.value
    return b.finish()


def _product(
    p: _Phase,
    index: Value,
    tiles: dict[tuple[int, int], ir.Function],
    name: str,
    inputs: int,
    outputs: int,
    output: str,
) -> None:
    """y [tokens, outputs] of 32 outputs and at most 64 tokens."""
    b, spec = p.b, p.spec
    groups = inputs // spec.group
    pairs = -(-outputs // PAIR)
    piece, pair = index // pairs, index % pairs
    block = pair * 2
    begin = piece * PIECE_TOKENS
    end = b.smaller(begin + PIECE_TOKENS, p.t.tokens)
    codes = getattr(p.layer, f"{name}_codes") + block * (inputs * BLOCK // 2)
    scales = getattr(p.layer, f"{name}_scales") + block * (groups * BLOCK)
    zeros = getattr(p.layer, f"{name}_zeros") + block * (groups * BLOCK)
    bias = getattr(p.layer, f"{name}_bias") + block * BLOCK
    planes, steps, sums = p.t.planes, p.t.steps, p.t.sums
    y = getattr(p.t, output) + block * BLOCK

    def sweep(rows: int) -> None:
        place = begin
        for width in sorted({w for r, w in tiles if r == rows}, reverse=True):
            stop = place + (end - place) // width * width
            with b.loop(place, stop, width) as token:
                data = planes + token * (inputs * spec.planes)
                at = token * groups
                pointers = [
                    codes,
                    scales,
                    zeros,
                    bias,
                    data,
                    steps + at,
                    sums + at,
                    y + token * outputs,
                ]
                b.call(tiles[rows, width], [*pointers, b.const(I64, inputs), b.const(I64, outputs)])
            place = stop

    if outputs % PAIR == 0:
        sweep(2)
        return
    with b.builder.if_else((pair < pairs - 1).ir) as (whole, last):
        with whole:
            sweep(2)
        with last:
            sweep(1)


# One token


def _quantize(p: _Phase, row: Pointer, token: Value, width: int) -> None:
    """A row of float32 [width] to the planes, steps and sums of a token; one step for each
    group."""
    b, spec = p.b, p.spec
    groups = width // spec.group
    planes = p.t.planes + token * (width * spec.planes)
    steps, sums = p.t.steps + token * groups, p.t.sums + token * groups
    limit = 127.0 * 256 ** (spec.planes - 1)
    with b.loop(0, groups) as g:
        start = g * spec.group
        most = b.variable(vec(F32), 0.0)
        with b.loop(start, start + spec.group, LANES) as k:
            most.value = larger(b, b.math("fabs", row.vector(k, LANES)), most.value)
        largest = b.largest(most.value)
        factor = b.splat(b.select(largest.differs(0.0), limit / largest, 0.0))
        total = b.variable(vec(I32), 0)
        with b.loop(start, start + spec.group, LANES) as k:
            v = nearest_int(b, row.vector(k, LANES) * factor)
            total.value = total.value + v
            for plane in range(spec.planes - 1, -1, -1):
                byte = b.trunc(v, vec(I8))
                planes[k + plane * width] = byte
                v = (v - b.sext(byte, vec(I32))) >> 8
        steps[g] = largest / limit
        sums[g] = b.signed_to_float(
            b.intrinsic("llvm.vector.reduce.add.v16i32", I32, [total.value]), F32
        )


def _norm(p: _Phase, source: Pointer, target: Pointer, weight: Pointer, bias: Pointer) -> None:
    """target = norm(source) · weight + bias over the hidden width; a weight that is not given means
    no norm."""
    b, spec = p.b, p.spec
    width = b.const(I64, spec.hidden)
    with b.builder.if_else(weight.is_given().ir) as (normed, plain):
        with normed:
            inverse, center = _moments(b, source, spec.hidden, spec.eps, spec.centered)
            with b.loop(0, width, LANES) as i:
                value = source.vector(i, LANES)
                if center is not None:
                    value = value - b.splat(center)
                value = value * b.splat(inverse)
                target[i] = b.fma(value, weight.vector(i, LANES), bias.vector(i, LANES))
        with plain, b.loop(0, width, LANES) as i:
            target[i] = source.vector(i, LANES)


def _moments(
    b: Emitter, source: Pointer, width: int, eps: float, centered: bool
) -> tuple[Value, Value | None]:
    """(1/√(mean square + eps), mean or None) of a row."""
    center = None
    if centered:
        total = b.variable(vec(F32), 0.0)
        with b.loop(0, width, LANES) as i:
            total.value = total.value + source.vector(i, LANES)
        center = b.sum(total.value) / float(width)
    squares = b.variable(vec(F32), 0.0)
    with b.loop(0, width, LANES) as i:
        value = source.vector(i, LANES)
        if center is not None:
            value = value - b.splat(center)
        squares.value = b.fma(value, value, squares.value)
    return 1.0 / b.math("sqrt", b.sum(squares.value) / float(width) + eps), center


def _embed(p: _Phase, token: Value) -> None:
    """hidden = norm(word + position + type); norms that come first then make what the first layer
    reads."""
    b, spec = p.b, p.spec
    row = p.t.hidden + token * spec.hidden
    word = p.t.words + b.sext(p.t.ids[token], I64) * spec.hidden
    tables = []
    for table, index in ((p.t.position_table, p.t.positions), (p.t.type_table, p.t.types)):
        place = b.variable(I64, 0)
        with b.when(table.is_given()):
            place.value = b.sext(index[token], I64)
        tables.append((table, place.value * spec.hidden))
    with b.loop(0, spec.hidden, LANES) as i:
        row[i] = word.floats(i, LANES) * spec.words_factor
    for table, offset in tables:
        with b.when(table.is_given()), b.loop(0, spec.hidden, LANES) as i:
            row[i] = row.vector(i, LANES) + table.vector(offset + i, LANES)
    if spec.embedding_norm:
        _norm(p, row, row, p.t.norm_weight, p.t.norm_bias)
    if spec.pre_norm:
        branch = p.t.branch + token * spec.hidden
        _norm(p, row, branch, p.t.first_norm_weight, p.t.first_norm_bias)
        row = branch
    _quantize(p, row, token, spec.hidden)


def _add_norm(p: _Phase, token: Value, number: int) -> None:
    """hidden = hidden + branch, its norm to integers. Where norms come last, or at the end, hidden
    becomes the norm."""
    b, spec = p.b, p.spec
    row, branch = p.t.hidden + token * spec.hidden, p.t.branch + token * spec.hidden
    weight, bias = _weights_of(p, f"norm{number}")
    if spec.post_norms:
        _norm(p, branch, branch, *_weights_of(p, f"post{number}"))
    with b.loop(0, spec.hidden, LANES) as i:
        row[i] = row.vector(i, LANES) + branch.vector(i, LANES)
    if not spec.pre_norm:
        _norm(p, row, row, weight, bias)
        _quantize(p, row, token, spec.hidden)
        return
    _norm(p, row, branch, weight, bias)
    if number == 2:
        with b.when(p.layer.keep_norm2.differs(0)), b.loop(0, spec.hidden, LANES) as i:
            row[i] = branch.vector(i, LANES)
    _quantize(p, branch, token, spec.hidden)


def _weights_of(p: _Phase, name: str) -> tuple[Pointer, Pointer]:
    """(weight, bias) of one of the layer's norms."""
    return getattr(p.layer, f"{name}_weight"), getattr(p.layer, f"{name}_bias")


def _quantize_context(p: _Phase, token: Value) -> None:
    _quantize(p, p.t.context + token * p.spec.context, token, p.spec.context)


def _activate(p: _Phase, token: Value) -> None:
    """act(up), or act(gate) · up, to integers."""
    b, spec = p.b, p.spec
    row = p.t.wide + token * (spec.inner * (2 if spec.gated else 1))
    with b.loop(0, spec.inner, LANES) as i:
        value = quick_activation(b, row.vector(i, LANES), spec.activation)
        if spec.gated:
            value = value * row.vector(i + spec.inner, LANES)
        row[i] = value
    _quantize(p, row, token, spec.inner)


# Attention


def _attend(p: _Phase, index: Value) -> None:
    """context [tokens, heads · dim] of one head of one text."""
    b, spec = p.b, p.spec
    text, head = index // spec.heads, index % spec.heads
    start = b.sext(p.t.starts[text], I64)
    length = b.sext(p.t.starts[text + 1], I64) - start
    padded = (length + (LANES - 1)) & -LANES
    kv_head = head // (spec.heads // spec.kv_heads)
    rows = p.t.wide + start * spec.channels
    queries = rows + head * spec.dim
    keys = rows + (kv_head + spec.heads) * spec.dim
    values = rows + (kv_head + (spec.heads + spec.kv_heads)) * spec.dim
    context = p.t.context + (start * spec.context + head * spec.dim)
    transposed = p.t.scratch + p.worker * p.t.scratch_values
    scores = transposed + padded * spec.dim
    q = scores + padded * QUERIES
    _transpose_keys(p, keys, transposed, q, length, padded)

    def block(first: Value, count: int) -> None:
        for r in range(count):
            position = first + r
            _prepare_query(p, queries + position * spec.channels, q + r * spec.dim, position)
        sight = _sight(p, first, count, length, padded)
        tops = _scores(p, transposed, scores, q, head, first, count, sight)
        inverses = [_softmax(b, scores + padded * r, top, sight) for r, top in enumerate(tops)]
        _gather(p, scores, values, context + first * spec.context, inverses, sight)

    whole = length // QUERIES * QUERIES
    with b.loop(0, whole, QUERIES) as first:
        block(first, QUERIES)
    with b.loop(whole, length) as first:
        block(first, 1)


def _prepare_query(p: _Phase, source: Pointer, target: Pointer, position: Value) -> None:
    """A head's channels of a query, times the scaling."""
    b, spec = p.b, p.spec
    _prepare_head(p, source, target, position, p.layer.q_norm)
    scaling = b.const(vec(F32), spec.scaling)
    with b.loop(0, spec.dim, LANES) as i:
        target[i] = target.vector(i, LANES) * scaling


def _prepare_head(
    p: _Phase, source: Pointer, target: Pointer, position: Value, norm: Pointer
) -> None:
    """A head's channels, normalized and rotated where the model does so."""
    b, spec = p.b, p.spec
    if spec.qk_norm:
        inverse, _ = _moments(b, source, spec.dim, spec.qk_eps, False)
        with b.loop(0, spec.dim, LANES) as i:
            target[i] = source.vector(i, LANES) * b.splat(inverse) * norm.vector(i, LANES)
    else:
        with b.loop(0, spec.dim, LANES) as i:
            target[i] = source.vector(i, LANES)
    if not spec.rotary:
        return
    half = spec.rotary
    lanes = LANES if half % LANES == 0 else 8
    cos, sin = p.layer.cos + position * half, p.layer.sin + position * half
    with b.loop(0, half, lanes) as i:
        left, right = target.vector(i, lanes), target.vector(i + half, lanes)
        c, s = cos.vector(i, lanes), sin.vector(i, lanes)
        target[i] = left * c - right * s
        target[i + half] = right * c + left * s


def _transpose_keys(
    p: _Phase, keys: Pointer, transposed: Pointer, scratch: Pointer, length: Value, padded: Value
) -> None:
    """transposed [dim, padded] of the keys, with zeros beyond the text's end."""
    b, spec = p.b, p.spec
    with b.loop(0, length) as j:
        source = keys + j * spec.channels
        if spec.rotary or spec.qk_norm:
            _prepare_head(p, source, scratch, j, p.layer.k_norm)
            source = scratch
        with b.loop(0, spec.dim) as d:
            transposed[d * padded + j] = source[d]
    with b.loop(length, padded) as j, b.loop(0, spec.dim) as d:
        transposed[d * padded + j] = b.const(F32, 0.0)


class _Sight(NamedTuple):
    """Which keys a few queries see: from `start` up to `stop`, both multiples of 16.

    A text has `length` of them, and up to a multiple of 16 `padded`.
    """

    start: Value
    stop: Value
    length: Value
    padded: Value


def _sight(p: _Phase, first: Value, count: int, length: Value, padded: Value) -> _Sight:
    """Of `count` queries from `first` on."""
    b, spec = p.b, p.spec
    start, ahead = b.const(I64, 0), padded
    if spec.windowed:
        before = first - p.layer.window
        start = b.select(before > 0, before & -LANES, 0)
        ahead = p.layer.window
    if spec.causal:
        ahead = b.const(I64, 0)
    stop = (first + (count + LANES - 1) + ahead) & -LANES
    return _Sight(start, b.smaller(stop, padded), length, padded)


def _scores(
    p: _Phase,
    transposed: Pointer,
    scores: Pointer,
    q: Pointer,
    head: Value,
    first: Value,
    count: int,
    sight: _Sight,
) -> list[Value]:
    """scores [count, padded] of queries from `first` on; what a query may not see is −∞. Returns
    each row's largest one."""
    b, spec = p.b, p.spec
    padded = sight.padded
    counting = Value(b, ir.Constant(vec(I32), list(range(LANES))))
    last = b.splat(b.trunc(sight.length, I32))
    tops = [b.variable(vec(F32), float("-inf")) for _ in range(count)]
    window = b.splat(b.trunc(p.layer.window, I32)) if spec.windowed else None
    with b.loop(sight.start, sight.stop, LANES) as j:
        sums = [b.variable(vec(F32), 0.0) for _ in range(count)]
        with b.loop(0, spec.dim) as d:
            key = transposed.vector(d * padded + j, LANES)
            for r, place in enumerate(sums):
                place.value = b.fma(b.splat(q[d + r * spec.dim]), key, place.value)
        places = b.splat(b.trunc(j, I32)) + counting
        inside = places < last
        for r, place in enumerate(sums):
            score = place.value
            seen = inside
            if spec.relative:
                table = p.layer.relative + head * (p.t.max_distance * 2 - 1)
                score = score + table.vector(j - (first + r) + (p.t.max_distance - 1), LANES)
            distance = places - b.splat(b.trunc(first + r, I32))
            if window is not None:
                seen = seen & (distance <= window) & (-distance <= window)
            if spec.causal:
                seen = seen & (distance <= 0)
            score = b.select(seen, score, float("-inf"))
            scores[padded * r + j] = score
            tops[r].value = larger(b, score, tops[r].value)
    return [b.largest(top.value) for top in tops]


def _softmax(b: Emitter, row: Pointer, top: Value, sight: _Sight) -> Value:
    """row = e^(row − top); returns 1 / its sum."""
    total = b.variable(vec(F32), 0.0)
    with b.loop(sight.start, sight.stop, LANES) as j:
        weight = quick_exp(b, row.vector(j, LANES) - b.splat(top))
        row[j] = weight
        total.value = total.value + weight
    return 1.0 / b.sum(total.value)


def _gather(
    p: _Phase,
    scores: Pointer,
    values: Pointer,
    context: Pointer,
    inverses: list[Value],
    sight: _Sight,
) -> None:
    """context rows = weights · values."""
    b, spec = p.b, p.spec
    stop = b.smaller(sight.stop, sight.length)
    with b.loop(0, spec.dim, LANES) as i:
        sums = [b.variable(vec(F32), 0.0) for _ in inverses]
        with b.loop(sight.start, stop) as j:
            value = values.vector(j * spec.channels + i, LANES)
            for r, place in enumerate(sums):
                place.value = b.fma(b.splat(scores[sight.padded * r + j]), value, place.value)
        for r, (place, inverse) in enumerate(zip(sums, inverses)):
            context[i + r * spec.context] = place.value * b.splat(inverse)


# The end


def _pool(p: _Phase, text: Value) -> None:
    """out [texts, hidden]: the mean over a text's tokens without its prompt, its first or its last
    token; norm 1 if asked."""
    b, spec = p.b, p.spec
    begin = b.sext(p.t.starts[text], I64)
    end = b.sext(p.t.starts[text + 1], I64)
    first = b.smaller(begin + p.t.prompt_tokens, end - 1)
    rows = {"mean": (first, end), "cls": (first, first + 1), "lasttoken": (end - 1, end)}
    start, stop = rows[spec.pooling]
    count = b.splat(b.signed_to_float(stop - start, F32))
    out = p.t.out + text * spec.hidden
    squares = b.variable(vec(F32), 0.0)
    with b.loop(0, spec.hidden, LANES) as i:
        total = b.variable(vec(F32), 0.0)
        with b.loop(start, stop) as token:
            total.value = total.value + p.t.hidden.vector(token * spec.hidden + i, LANES)
        value = total.value / count
        out[i] = value
        squares.value = b.fma(value, value, squares.value)
    if spec.normalize:
        size = b.math("sqrt", b.sum(squares.value))
        factor = b.splat(1.0 / b.maximum(size, 1e-12))
        with b.loop(0, spec.hidden, LANES) as i:
            out[i] = out.vector(i, LANES) * factor
