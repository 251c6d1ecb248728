"""Embed sentences with an encoder, pooled as its directory says, L2-normalised.

With --output the embeddings are written to a file, with --json they are printed. Otherwise a table
of cosines shows how near the texts are to each other.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from awq.cli.arguments import add_device, add_dtype, positive

PIECE_TEXTS = 1024  # embedded between two moves of the progress bar
MAX_TABLE_TEXTS = 20  # a table of more cosines is no help to the eye


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="directory or hub id, quantized or not")
    parser.add_argument("texts", nargs="*", help="texts, beside those of --input")
    parser.add_argument(
        "--input", metavar="FILE", help="file of texts, one a line; - reads them from stdin"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write a .npy matrix, or texts and embeddings as .jsonl or .parquet",
    )
    parser.add_argument("--batch-size", type=positive, default=32, help="texts embedded together")
    parser.add_argument("--prompt-name", help="name of one of the model's prompts, e.g. query")
    add_dtype(parser)
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    from awq.cli.output import output_file, show, whole_file
    from awq.errors import ConfigError

    texts = arguments.texts + _lines(arguments.input)
    if not texts:
        raise ConfigError("no texts to embed; give some, or a file with --input.")

    output = None if arguments.output is None else output_file("--output", arguments.output)
    if output is not None and output.suffix not in WRITERS:
        raise ConfigError(f"--output {output}: write to a file named {', '.join(WRITERS)}.")

    from awq.embed.encoder import Encoder

    encoder = Encoder.from_pretrained(
        arguments.model, device=arguments.device, dtype=arguments.dtype
    )
    vectors = _encoded(encoder, texts, arguments)
    if output is not None:
        with whole_file(output) as work:
            WRITERS[output.suffix](work, texts, vectors)
        found = {"texts": len(texts), "features": vectors.shape[1], "output": str(output)}
        show(
            found,
            arguments.json,
            f"{len(texts)} embeddings of {vectors.shape[1]} features written to {output}",
        )

        return

    similarity = (vectors @ vectors.t()).tolist()
    show(
        {"embeddings": vectors.tolist(), "cosine": similarity},
        arguments.json,
        _for_people(texts, vectors, similarity),
    )


def _encoded(encoder: Any, texts: list[str], arguments: argparse.Namespace) -> Any:
    """float32 [texts, features]; a bar on terminals when there are many."""
    import torch
    from tqdm import tqdm

    hidden = arguments.quiet or len(texts) <= PIECE_TEXTS or not sys.stderr.isatty()
    parts = []
    with tqdm(total=len(texts), unit="text", disable=hidden) as bar:
        for start in range(0, len(texts), PIECE_TEXTS):
            piece = texts[start : start + PIECE_TEXTS]
            embeddings = encoder.encode(
                piece,
                arguments.batch_size,
                normalize=True,
                prompt_name=arguments.prompt_name,
            )
            parts.append(embeddings)
            bar.update(len(piece))

    return torch.cat(parts)


def _lines(name: str | None) -> list[str]:
    """The lines of a file, or of stdin for "-", that are not empty."""
    from awq.errors import CalibrationError

    if name is None:
        return []

    try:
        whole = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise CalibrationError(f"{name} cannot be read as a file of texts: {error}.") from error

    return [line for line in whole.split("\n") if line.strip()]


def _write_npy(path: Path, texts: list[str], vectors: Any) -> None:
    import numpy

    numpy.save(path, vectors.numpy())


def _write_jsonl(path: Path, texts: list[str], vectors: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text, vector in zip(texts, vectors.tolist()):
            file.write(json.dumps({"text": text, "embedding": vector}, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, texts: list[str], vectors: Any) -> None:
    import pyarrow
    from pyarrow import parquet

    values = pyarrow.array(vectors.numpy().reshape(-1), pyarrow.float32())
    rows = pyarrow.FixedSizeListArray.from_arrays(values, vectors.shape[1])
    parquet.write_table(pyarrow.table({"text": texts, "embedding": rows}), path)


WRITERS = {".npy": _write_npy, ".jsonl": _write_jsonl, ".parquet": _write_parquet}


def _for_people(texts: list[str], vectors: Any, similarity: list[list[float]]) -> str:
    advice = "--json prints the embeddings, --output FILE writes them"
    if len(texts) == 1 or len(texts) > MAX_TABLE_TEXTS:
        return f"{len(texts)} embeddings of {vectors.shape[1]} features; {advice}."

    lines = [
        f"{' '.join(f'{value:.3f}' for value in row)}  {text}"
        for text, row in zip(texts, similarity)
    ]
    return "\n".join(
        [f"Cosine similarity of each text to all of them, in their order ({advice}):", *lines]
    )
