"""The `awq` command: one file per verb, same names and defaults as the Python API.

Exit status: 0 done, 1 a quality gate that was not kept, 2 an error, told in one line on stderr
(`--debug` shows the traceback); so scripts can tell the two apart. What a verb found goes to stdout
and everything else to stderr, so `--json` can be piped. No verb imports torch before its `run`:
`awq --help` answers in a tenth of a second.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

from awq._bars import no_progress_bars
from awq.cli.output import ERROR, OK, installed_version

VERBS = (
    "quantize",
    "generate",
    "chat",
    "embed",
    "eval",
    "bench",
    "compare",
    "convert",
    "info",
    "report",
    "folds",
    "tune",
    "env",
    "completion",
)
# What messages call by its name in Python → what it is called here.
_FLAGS = {
    "group_size": "--group-size",
    "modules_to_not_convert": "--skip",
    "max_calib_samples": "--samples",
    "max_calib_seq_len": "--tokens",
    "text_column": "--text-column",
    "max_kl": "--max-kl",
    "max_ppl_increase": "--max-ppl-increase",
    "min_cosine": "--min-cosine",
}


class _Help(argparse.HelpFormatter):
    """Shows the default of every option that has one worth showing."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if (
            default is None
            or default is False
            or default == []
            or default == argparse.SUPPRESS
            or "default" in text
        ):
            return text

        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{text} (default: {shown})".strip()


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, and where to look, instead of printing all options."""

    def error(self, message: str) -> NoReturn:
        self.exit(ERROR, f"{self.prog}: {message} (`{self.prog} --help` shows what there is)\n")

    def options(self) -> list[str]:
        """Every option in its long form."""
        return [name for action in self._actions for name in action.option_strings]


class _Version(argparse.Action):
    """Prints versions of the package and of what it stands on, read without importing them."""

    def __call__(self, parser: argparse.ArgumentParser, *_others: object) -> None:
        import awq

        parts = [f"awq {awq.__version__}"]
        for name in ("torch", "transformers"):
            version = installed_version(name)
            if version is None:
                parts.append(f"no {name}")
            else:
                parts.append(f"{name} {version}")

        print(", ".join(parts))
        parser.exit()


def make_parser() -> _Parser:
    """The parser of the command with all verbs."""
    parser = _Parser(
        prog="awq", description="4-bit AWQ quantization of language and embedding models."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show versions and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name in VERBS:
        module = import_module(f"awq.cli.{name}")
        about = module.__doc__ or name
        first = " ".join(about.split("\n\n")[0].split())  # the paragraph, on however many lines
        sub = verbs.add_parser(name, help=first, description=about, formatter_class=_Help)
        module.add_arguments(sub)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument(
            "--quiet", action="store_true", help="no progress and no warnings on stderr"
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=module.run, parser=sub)

    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit status."""
    given = sys.argv[1:] if argv is None else argv
    arguments = _read(make_parser(), given)
    arguments.command_line = ["awq", *given]
    if arguments.verb is None:
        make_parser().print_help(sys.stderr)
        return ERROR

    if not sys.stderr.isatty():
        # A pipe or a log file gets no bars. transformers and the hub look when they are imported.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    try:
        with _silence() if arguments.quiet else nullcontext():
            status = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone. stdout must not be flushed again when Python ends, which would fail
        # the same way.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _failed(arguments, "the program that reads the output closed it.")
    except KeyboardInterrupt:
        return _failed(arguments, "interrupted.")
    # whatever torch, transformers or the system raise, a person gets one line
    except Exception as error:
        if arguments.debug:
            raise
        return _failed(arguments, _one_line(error))

    return OK if status is None else status


def _read(parser: _Parser, given: list[str]) -> argparse.Namespace:
    """The arguments. A verb or an option that does not exist is told with the nearest that does."""
    is_verb = bool(given) and not given[0].startswith("-")
    if is_verb and given[0] not in VERBS:
        parser.error(f"no verb {given[0]!r}{_nearest(given[0], dict(zip(VERBS, VERBS)))}")
    arguments, unknown = parser.parse_known_args(given)
    if unknown:
        verb = getattr(arguments, "parser", parser)
        verb.error(_unknown(unknown[0].partition("=")[0], verb.options()))

    return arguments


def _unknown(name: str, options: Sequence[str]) -> str:
    """What is said about a word that no argument takes."""
    if name.startswith("-"):
        in_python = {f"--{word.replace('_', '-')}": flag for word, flag in _FLAGS.items()}
        flags = dict(zip(options, options))
        flags |= {word: flag for word, flag in in_python.items() if flag in flags}
        return f"no option {name!r}{_nearest(name, flags)}"
    return f"no place for {name!r}"


def _nearest(name: str, known: Mapping[str, str]) -> str:
    """Like "; did you mean --samples?", or nothing where nothing is near. known: word → what to
    write for it."""
    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {known[near[0]]}?" if near else ""


@contextmanager
def _silence() -> Iterator[None]:
    """No warnings and none of transformers' progress bars inside."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with no_progress_bars():
            yield
    finally:
        logging.disable(before)


def _failed(arguments: argparse.Namespace, line: str) -> int:
    print(f"awq {arguments.verb}: {line}", file=sys.stderr)
    return ERROR


def _one_line(error: Exception) -> str:
    from awq.errors import AwqError

    text = " ".join(str(error).split())
    for name, flag in _FLAGS.items():
        text = re.sub(rf"\b{name}\b", flag, text)
    if isinstance(error, AwqError):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"
