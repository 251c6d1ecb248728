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

Where every worker has enough tokens, a layer has three phases: an item of the first is qkv of a
slice of tokens, attention is as above, and an item of the third is a slice of tokens through all
the rest. A team then meets three times in a layer instead of nine, and numbers stay near the core
that made them. `native.runner.division` chooses. Matrix units keep the nine phases: weights that
are unpacked serve all tokens there.

An item's result does not depend on who computes it, so any number of workers gives the same bits.
Everything that is the same for all texts (`EncoderSpec`) is a constant of the machine code. The
arithmetic is float32, but for the products: see `products`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llvmlite import ir

from awq.kernels.cpu.emit import Emitter
from awq.kernels.cpu.encoder import attention, rows
from awq.kernels.cpu.encoder.layout import JOB, LAYER, LAYER_FIELDS
from awq.kernels.cpu.encoder.matrix_products import MatrixProducts
from awq.kernels.cpu.encoder.operands import Product
from awq.kernels.cpu.encoder.phase import (
    Item,
    Phase,
    emit_call,
    emit_serve,
    run_phase,
)
from awq.kernels.cpu.encoder.vector_products import VectorProducts
from awq.kernels.cpu.ir_types import I64, PTR
from awq.kernels.cpu.targets import Target
from awq.kernels.cpu.values import Pointer, Value
from awq.native.spec import COUNTERS_PER_PHASE, PHASES_PER_LAYER, EncoderSpec


def emit_encoder(
    module: ir.Module,
    element: ir.Type,
    target: Target,
    spec: EncoderSpec,
) -> list[ir.Function]:
    """forward(job, worker), and serve(pool) and call(pool, job) for its threads."""
    forward = _emit_forward(module, element, target, spec)
    return [forward, emit_serve(module, forward), emit_call(module, forward)]


def _emit_forward(
    module: ir.Module,
    element: ir.Type,
    target: Target,
    spec: EncoderSpec,
) -> ir.Function:
    products: MatrixProducts | VectorProducts
    if spec.matrix_unit:
        products = MatrixProducts(module, spec)
    else:
        products = VectorProducts(module, target, spec)

    def define(name: str, emit: Callable[[Phase, list[Any]], None]) -> ir.Function:
        b, arguments = Emitter.define(module, name, [PTR, PTR, I64, I64], internal=True)
        job, layer, worker, _ = arguments
        t = JOB.reader(b, job, element)
        emit(Phase(b, t, LAYER.reader(b, layer, element), worker, spec), arguments)
        return b.finish()

    def step(name: str, item: Item, count: str) -> Step:
        return Step(define(name, lambda p, arguments: item(p, arguments[-1])), count)

    def multiply(*shape: Any) -> Step:
        product = Product(*shape)
        function = define(product.name, lambda p, args: products.item(p, args[-1], product))
        return Step(function, "outputs", product.pairs)

    def chain(name: str, steps: Sequence[Step]) -> Step:
        return Step(define(name, lambda p, arguments: _follow(p, arguments, steps)), "pieces")

    inner_channels = spec.inner * (2 if spec.gated else 1)
    embed = step("embed", rows.embed, "tokens")
    pool = step("pool", rows.pool, "texts")
    qkv = multiply("qkv", spec.hidden, spec.channels, "wide")
    attend = step("attend", attention.attend, "heads")
    rest = (
        step("quantize_context", rows.quantize_context, "tokens"),
        multiply("o", spec.context, spec.hidden, "branch"),
        step("add_norm1", lambda p, index: rows.add_norm(p, index, 1), "tokens"),
        multiply("up", spec.hidden, inner_channels, "wide"),
        step("activate", rows.activate, "tokens"),
        multiply("down", spec.inner, spec.hidden, "branch"),
        step("add_norm2", lambda p, index: rows.add_norm(p, index, 2), "tokens"),
    )

    b, (job, worker) = Emitter.define(module, "forward", [PTR, I64])
    t = JOB.reader(b, job, element)
    counters = t.counters
    layers = t.layers
    workers = t.workers
    tokens = t.tokens
    texts = t.texts
    piece_tokens: Value | int = t.piece_tokens
    if isinstance(products, MatrixProducts):
        piece_tokens = products.piece_tokens
    pieces = (tokens + (piece_tokens - 1)) // piece_tokens
    counts = {"tokens": tokens, "texts": texts, "heads": texts * spec.heads, "pieces": pieces}

    def run(step: Step, phase: Value, layer: Pointer) -> None:
        items = pieces * step.pairs if step.items == "outputs" else counts[step.items]
        own = counters + phase * COUNTERS_PER_PHASE
        run_phase(b, step.function, items, own, job, layer, worker, workers)

    def run_layer(steps: Sequence[Step], n: Value) -> None:
        layer = layers + n * LAYER_FIELDS
        for i, step in enumerate(steps):
            run(step, n * PHASES_PER_LAYER + (i + 1), layer)

    by_outputs = (qkv, attend, *rest)
    run(embed, b.const(I64, 0), layers)
    if isinstance(products, MatrixProducts):
        products.begin(b)
        with b.loop(0, spec.layers) as n:
            run_layer(by_outputs, n)
        products.end(b)
    else:
        by_slices = (chain("first", [qkv]), attend, chain("rest", rest))
        with b.loop(0, spec.layers) as n, b.builder.if_else(t.is_sliced.differs(0).ir) as ways:
            for way, steps in zip(ways, (by_slices, by_outputs)):
                with way:
                    run_layer(steps, n)

    run(pool, b.const(I64, spec.phases - 1), layers)
    return b.finish()


class Step(NamedTuple):
    """A phase's function. items: what there are as many of. pairs: items of a product for a piece
    of tokens."""

    function: ir.Function
    items: str
    pairs: int = 0


def _follow(p: Phase, arguments: list[Any], steps: Sequence[Step]) -> None:
    """The steps one after the other, for the piece of tokens that the last argument names."""
    b = p.b
    *others, piece = arguments
    begin = piece * p.t.piece_tokens
    end = b.smaller(begin + p.t.piece_tokens, p.t.tokens)

    for step in steps:
        first, stop = begin, end
        if step.items == "outputs":
            first = piece * step.pairs
            stop = first + step.pairs
        with b.loop(first, stop) as item:
            b.call(step.function, [*others, item])
