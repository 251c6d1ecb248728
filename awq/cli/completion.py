"""Print a completion script for your shell: `source <(awq completion bash)`."""

from __future__ import annotations

import argparse

SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="which shell the script is for")


def run(arguments: argparse.Namespace) -> None:
    from awq.cli import make_parser
    from awq.cli.output import show
    from awq.errors import ConfigError

    try:
        import shtab
    except ImportError as error:
        raise ConfigError("completion scripts need shtab: pip install shtab.") from error

    script = shtab.complete(make_parser(), shell=arguments.shell)
    show({"shell": arguments.shell, "script": script}, arguments.json, script)
