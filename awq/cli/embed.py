"""Embed sentences with a quantized encoder (mean pooling, L2-normalised)."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="quantized directory or hub id")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--device")


def run(arguments: argparse.Namespace) -> None:
    from awq import AutoAWQForEmbedding
    from awq.cli.output import show
    from awq.errors import ModelError
    from awq.evals.similarity import embed_texts

    model = AutoAWQForEmbedding.from_quantized(arguments.model, device=arguments.device)
    if model.tokenizer is None:
        raise ModelError(f"{arguments.model} has no tokenizer.")
    vectors = embed_texts(model, model.tokenizer, arguments.texts)
    similarity = (vectors @ vectors.t()).tolist()
    lines = [f"{text}: {' '.join(f'{value:.3f}' for value in row)}" for text, row in zip(arguments.texts, similarity)]
    show({"embeddings": vectors.tolist(), "cosine": similarity}, arguments.json, "\n".join(lines))
