"""Talk with a quantized language model: history, a system prompt, answers as they are written.

Lines that begin with a slash are commands; `/help` lists them. Input that is no terminal works too:
one message a line.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from awq.cli.arguments import add_device, add_dtype, limit, positive

if TYPE_CHECKING:
    from awq.cli.conversation import Conversation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="quantized directory or hub id")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--max-new-tokens", type=positive, default=512, help="of one answer")
    parser.add_argument(
        "--max-seq-len",
        type=positive,
        default=2048,
        help="tokens of the whole conversation that are kept",
    )
    parser.add_argument(
        "--temperature", type=limit, default=0.0, help="0: always the most likely token"
    )
    parser.add_argument(
        "--top-p",
        type=limit,
        default=0.95,
        help="share of the likely tokens to draw from, with a temperature",
    )
    parser.add_argument("--seed", type=int, help="of the random draw")
    add_dtype(parser)
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    from awq.cli.conversation import Conversation
    from awq.cli.output import show

    if arguments.seed is not None:
        import torch

        torch.manual_seed(arguments.seed)

    conversation = Conversation.open(arguments)
    terminal = sys.stdin.isatty()
    if terminal:
        _read_lines_comfortably()
        print("Type a message, or /help. Ctrl-D ends.", file=sys.stderr)

    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            break

        if not line:
            continue
        if line.startswith("/"):
            if not conversation.command(line):
                break
            continue
        _answer(conversation, line)

    if arguments.json:
        show({"messages": conversation.messages}, True)


def _answer(conversation: Conversation, line: str) -> None:
    """One turn. Ctrl-C stops the answer, and the conversation goes on without that turn."""
    try:
        conversation.say(line)
    except KeyboardInterrupt:
        conversation.take_back()
        print("\n(stopped; this turn is forgotten)", file=sys.stderr)


def _read_lines_comfortably() -> None:
    """Arrow keys and earlier lines at the prompt, where Python was built with readline."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return
