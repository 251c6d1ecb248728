"""Where calibration texts come from: a local file, a dataset of the hub, or the text bundled with the package."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Iterable
from importlib import resources
from itertools import islice
from pathlib import Path

from awq.calibration.corpora import with_corpus_form
from awq.errors import CalibrationError

logger = logging.getLogger("awq.calibration")

_HUB_NAMES = {"pileval": ("mit-han-lab/pile-val-backup", "validation")}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
_SHORTEST = 16  # characters of a piece worth a row
_SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".csv", ".tsv", ".parquet")


def bundled_texts(short: bool = False) -> list[str]:
    """Passages of the free, mostly English text that ships with the package; half of the prose in the form of corpora.

    short: all of it as it is written, cut into lines and sentences, as embedding models meet text.
    """
    text = resources.files("awq.calibration").joinpath("data/passages.txt").read_text(encoding="utf-8")
    passages = [p.strip() for p in text.split("\n\n") if p.strip()]
    if not short:
        return with_corpus_form(passages)
    pieces = (piece for p in passages for line in p.split("\n") for piece in _SENTENCE_END.split(line))
    return [piece for piece in pieces if len(piece) >= _SHORTEST]


def named_texts(name: str, split: str, column: str, limit: int) -> list[str]:
    """Texts of a local file or a hub dataset; the bundled text, with a warning, when the hub cannot be reached.

    Raises CalibrationError for a file that is missing, empty or has no such column, and for a directory.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return file_texts(path, column)
    if path.is_dir():
        raise CalibrationError(f"{name} is a directory; give one file of texts ({', '.join(_SUFFIXES)}).")
    if path.suffix.lower() in _SUFFIXES or path.is_absolute():
        raise CalibrationError(f"calibration file {name} does not exist.")
    dataset, split = _HUB_NAMES.get(name, (name, split))
    try:
        from datasets import load_dataset

        rows = list(islice(load_dataset(dataset, split=split, streaming=True), limit))
    except Exception as error:  # the hub fails in many ways: offline mode, DNS, missing dataset, HTTP errors
        logger.warning(
            "calibration dataset %s cannot be loaded (%s: %s); using the bundled text. Texts of your own task give better results.",
            dataset, type(error).__name__, str(error).splitlines()[0] if str(error) else "",
        )  # fmt: skip
        return bundled_texts()
    if rows and not any(column in row for row in rows):
        raise CalibrationError(f"dataset {dataset} has no column {column!r}, only {sorted(rows[0])}; give text_column.")
    texts = _only_texts(row.get(column) for row in rows)
    if not texts:
        raise CalibrationError(f"dataset {dataset} holds no text in column {column!r} of split {split!r}.")
    return texts


def file_texts(path: Path, column: str = "text") -> list[str]:
    """Texts of a local file: paragraphs of .txt/.md, or one column of .jsonl, .json, .csv, .tsv or .parquet."""
    try:
        values = _parquet_column(path, column) if path.suffix.lower() == ".parquet" else _text_file_values(path, column)
    except (KeyError, csv.Error, TypeError, ValueError) as error:  # JSON and Unicode errors are ValueErrors
        raise CalibrationError(f"{path} cannot be read as calibration texts with column {column!r}: {error!r}.") from error
    texts = _only_texts(values)
    if not texts:
        raise CalibrationError(f"{path} holds no text.")
    return texts


def _text_file_values(path: Path, column: str) -> list[object]:
    suffix = path.suffix.lower()
    text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark, which would hide the first column
    if suffix in (".csv", ".tsv"):
        return _csv_column(text, column, "\t" if suffix == ".tsv" else ",")
    if suffix == ".jsonl":
        # Not splitlines(): JSON strings may hold U+2028 and its like, at which that would cut.
        return [_field(json.loads(line), column) for line in text.split("\n") if line.strip()]
    if suffix == ".json":
        return [_field(row, column) for row in json.loads(text)]
    return list(text.split("\n\n"))


def _csv_column(text: str, column: str, delimiter: str) -> list[object]:
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))  # long samples are cut later, not refused here
    try:
        return [row[column] for row in csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)]
    finally:
        csv.field_size_limit(limit)


def _parquet_column(path: Path, column: str) -> list[object]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise CalibrationError(f"{path} needs pyarrow: pip install pyarrow.") from error
    return pyarrow.parquet.read_table(path, columns=[column])[column].to_pylist()


def _field(row: object, column: str) -> object:
    return row if isinstance(row, str) else row[column]  # type: ignore[index]


def _only_texts(values: Iterable[object]) -> list[str]:
    """Empty and missing fields are common in datasets and say nothing."""
    return [v for v in values if isinstance(v, str) and v.strip()]
