"""The `awq` command: one file per verb, same names and defaults as the Python API."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

VERBS = ("quantize", "generate", "bench", "embed", "info", "convert", "folds", "report", "tune")


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit status (0, or 1 with one line on stderr for an `AwqError`)."""
    parser = argparse.ArgumentParser(prog="awq", description="4-bit AWQ quantization of language and embedding models.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name in VERBS:
        module = import_module(f"awq.cli.{name}")
        about = module.__doc__ or name
        sub = verbs.add_parser(name, help=about.splitlines()[0], description=about)
        module.add_arguments(sub)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    from awq.errors import AwqError

    try:
        arguments.run(arguments)
    except AwqError as error:
        print(f"awq {arguments.verb}: {error}", file=sys.stderr)
        return 1
    return 0
