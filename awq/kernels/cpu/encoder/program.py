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

from typing import Any

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

    def define(name: str, item: Item) -> ir.Function:
        b, (job, layer, worker, index) = Emitter.define(
            module, name, [PTR, PTR, I64, I64], internal=True
        )
        t = JOB.reader(b, job, element)
        item(Phase(b, t, LAYER.reader(b, layer, element), worker, spec), index)
        return b.finish()

    def multiply(*shape: Any) -> tuple[ir.Function, Product]:
        product = Product(*shape)
        return define(product.name, lambda p, index: products.item(p, index, product)), product

    inner_channels = spec.inner * (2 if spec.gated else 1)
    embed = define("embed", rows.embed)
    pool = define("pool", rows.pool)
    layer_phases: tuple[tuple[ir.Function, Any], ...] = (
        multiply("qkv", spec.hidden, spec.channels, "wide"),
        (define("attend", attention.attend), "heads"),
        (define("quantize_context", rows.quantize_context), "tokens"),
        multiply("o", spec.context, spec.hidden, "branch"),
        (define("add_norm1", lambda p, index: rows.add_norm(p, index, 1)), "tokens"),
        multiply("up", spec.hidden, inner_channels, "wide"),
        (define("activate", rows.activate), "tokens"),
        multiply("down", spec.inner, spec.hidden, "branch"),
        (define("add_norm2", lambda p, index: rows.add_norm(p, index, 2)), "tokens"),
    )

    b, (job, worker) = Emitter.define(module, "forward", [PTR, I64])
    t = JOB.reader(b, job, element)
    counters = t.counters
    layers = t.layers
    workers = t.workers
    tokens = t.tokens
    texts = t.texts
    pieces = (tokens + (products.piece_tokens - 1)) // products.piece_tokens
    sizes = {"tokens": tokens, "heads": texts * spec.heads}

    def run(function: ir.Function, items: Value, phase: Value, layer: Pointer) -> None:
        run_phase(
            b, function, items, counters + phase * COUNTERS_PER_PHASE, job, layer, worker, workers
        )

    if isinstance(products, MatrixProducts):
        products.begin(b)
    run(embed, tokens, b.const(I64, 0), layers)
    with b.loop(0, spec.layers) as n:
        layer = layers + n * LAYER_FIELDS
        for i, (function, size) in enumerate(layer_phases):
            items = pieces * size.pairs if isinstance(size, Product) else sizes[size]
            run(function, items, n * PHASES_PER_LAYER + (i + 1), layer)

    run(pool, texts, b.const(I64, spec.phases - 1), layers)
    if isinstance(products, MatrixProducts):
        products.end(b)
    return b.finish()
