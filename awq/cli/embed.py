"""Embed sentences with an encoder, pooled as its directory says, L2-normalised."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="directory or hub id, quantized or not")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--device")
    parser.add_argument("--prompt-name", help="name of one of the model's prompts, e.g. query")


def run(arguments: argparse.Namespace) -> None:
    from awq.cli.output import show
    from awq.embed.encoder import Encoder

    encoder = Encoder.from_pretrained(arguments.model, device=arguments.device)
    vectors = encoder.encode(arguments.texts, normalize=True, prompt_name=arguments.prompt_name)
    similarity = (vectors @ vectors.t()).tolist()
    lines = [f"{text}: {' '.join(f'{value:.3f}' for value in row)}" for text, row in zip(arguments.texts, similarity)]
    show({"embeddings": vectors.tolist(), "cosine": similarity}, arguments.json, "\n".join(lines))
