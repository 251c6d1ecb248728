"""Arguments that several verbs share, and types that refuse bad values while the command line is
read."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from awq.config import COMPRESSED_TENSORS, DENSE

if TYPE_CHECKING:
    from awq.evals.gates import Gates

VERSIONS = ("GEMM", "GEMV", "GEMVFast")
OTHER_LAYOUTS = (COMPRESSED_TENSORS, DENSE)  # those of other programs
PRESETS = ("fast", "balanced", "best")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def group_size(text: str) -> int:
    """-1 for the whole row, or a whole number of at least 8."""
    if text.strip() != "-1" and (not text.strip().isdecimal() or int(text) < 8):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither -1 (the whole row) nor a whole number of at least 8"
        )
    return int(text)


def version(text: str) -> str:
    """The name of a layout in any spelling ("gemm", "gemv_fast") as it is listed; others stay, and
    are refused."""
    plain = _plain(text)
    return next((name for name in (*VERSIONS, *OTHER_LAYOUTS) if _plain(name) == plain), text)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU if there is one")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of everything that is not packed; auto: as saved",
    )


def add_version(
    parser: argparse.ArgumentParser,
    default: str | None = None,
    others: tuple[str, ...] = (),
) -> None:
    """`--version`; without a default it must be given. others: layouts of other programs that it
    takes."""
    about = "layout of the files; GEMM is what other programs read"
    parser.add_argument(
        "--version",
        type=version,
        choices=(*VERSIONS, *others),
        default=default,
        required=default is None,
        help=about,
    )


def limit(text: str) -> float:
    """A number of a quality gate: finite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan

    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return value


def only_text(flag: str, texts: list[str]) -> str:
    """The one file of an option that may be given several times, for models that are judged on one.
    Raises ConfigError for more."""
    from awq.errors import ConfigError

    if len(texts) > 1:
        raise ConfigError(f"{flag}: an embedding model is judged on one file; give it once.")
    return texts[0]


def add_gates(parser: argparse.ArgumentParser) -> None:
    """`--max-kl`, `--max-ppl-increase` and `--min-cosine`; status 1 when one is not kept."""
    gates = parser.add_argument_group("quality gates (exit status 1 when one is not kept)")
    gates.add_argument(
        "--max-kl",
        type=limit,
        metavar="NATS",
        help="mean KL divergence from the original, per token",
    )
    gates.add_argument(
        "--max-ppl-increase", type=limit, metavar="PERCENT", help="of the original's perplexity"
    )
    gates.add_argument(
        "--min-cosine",
        type=limit,
        metavar="COSINE",
        help="mean cosine to the original's embeddings",
    )


def gates_of(arguments: argparse.Namespace) -> Gates:
    """The gates that a command line gives."""
    from awq.evals.gates import Gates

    return Gates(arguments.max_kl, arguments.max_ppl_increase, arguments.min_cosine)
