"""Convert a saved checkpoint into another layout: AWQ's three, compressed-tensors or dense."""

from __future__ import annotations

import argparse

from awq.cli.arguments import OTHER_LAYOUTS, add_version


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="quantized directory")
    parser.add_argument("output", help="directory to write")
    add_version(parser, others=OTHER_LAYOUTS)


def run(arguments: argparse.Namespace) -> None:
    from awq.checkpoint import convert_checkpoint
    from awq.cli.output import show

    count = convert_checkpoint(arguments.model, arguments.output, arguments.version)
    show(
        {"converted": count, "version": arguments.version, "output": arguments.output},
        arguments.json,
    )
