"""Where calibration texts come from: a local file, a dataset of the hub, or the text bundled with
the package."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import resources
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

from awq._hub import ask_hub_once
from awq.errors import CalibrationError, first_line

logger = logging.getLogger("awq.calibration")

MAX_FILE_BYTES = 1 << 30
MAX_COLUMNS_SHOWN = 12  # in a message about one that is missing
CHAT_COLUMNS = ("messages", "conversations")
_HUB_NAMES = {"pileval": ("mit-han-lab/pile-val-backup", "validation")}
_DATASET_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
_EMPTY_LINE = re.compile(r"\n[^\S\n]*\n")
_MIN_PIECE_CHARACTERS = 16  # of a piece that is worth a row
_limit_of_fields = Lock()
_SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".csv", ".tsv", ".parquet")


def bundled_texts(short: bool = False) -> list[str]:
    """Passages of the free text that ships with the package, as they are written.

    short: cut into lines and sentences, as embedding models meet text.
    """
    text = (
        resources.files("awq.calibration").joinpath("data/passages.txt").read_text(encoding="utf-8")
    )
    passages = [p.strip() for p in text.split("\n\n") if p.strip()]
    if not short:
        return passages

    pieces = (
        piece for p in passages for line in p.split("\n") for piece in _SENTENCE_END.split(line)
    )
    return [piece for piece in pieces if len(piece) >= _MIN_PIECE_CHARACTERS]


def bundled_chats() -> list[list[dict[str, str]]]:
    """Conversations that ship with the package: lists of {"role", "content"}, reasoning among
    them."""
    return [chat["messages"] for chat in _bundled_lines("chats.jsonl")]


def bundled_tool_chats() -> list[dict[str, Any]]:
    """Conversations with tool calls: {"messages": …, "tools": JSON schemas of the functions}."""
    return _bundled_lines("tool_chats.jsonl")


def _bundled_lines(name: str) -> list[dict[str, Any]]:
    file = resources.files("awq.calibration").joinpath(f"data/{name}")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def named_texts(name: str, split: str, column: str, limit: int) -> list[str]:
    """Texts of a local file or a dataset of the hub; the bundled text, with a warning, for
    "pileval" without a network.

    Raises CalibrationError as `named_samples` does.
    """
    samples, _ = named_samples(name, split, column, limit)
    if samples is None:
        return bundled_texts()
    return [sample for sample in samples if isinstance(sample, str)]


def named_samples(
    name: str | os.PathLike,
    split: str,
    column: str,
    limit: int,
    text_per_line: bool = False,
) -> tuple[list[Any] | None, bool]:
    """(texts or chats of a local file or a dataset, whether they are the user's own file).

    (None, False) stands for the bundled text: "pileval", the default, when the hub cannot be
    reached.
    text_per_line: a .txt or .md without empty lines is one text per line. Raises CalibrationError
    for a file that is missing, empty, too large or has no such column, for a directory, for a
    string that can be neither a file nor a dataset, and for a dataset that cannot be loaded.
    """
    path = _existing(name)
    if path is not None:
        return file_samples(path, column, text_per_line), True

    name = os.fspath(name)
    if Path(name).suffix.lower() in _SUFFIXES or name.startswith(("/", "~", ".")):
        raise CalibrationError(f"calibration file {_shown(name)} does not exist.")
    if not _DATASET_NAME.fullmatch(name):
        raise CalibrationError(
            f"calibration data is the one string {_shown(name)}, neither a file nor the name of a "
            "dataset; "
            "give a list of texts, a file or a name such as 'owner/dataset'."
        )
    return _hub_samples(name, split, column, limit), False


def _existing(name: str | os.PathLike) -> Path | None:
    """The regular file of that name, or None. Raises CalibrationError for directories and other
    things that exist."""
    try:
        path = Path(os.fspath(name)).expanduser()
        if path.is_file():
            return path
        exists = path.exists()
        folder = path.is_dir()
    # too long, an unknown user, a zero byte, bytes
    except (OSError, RuntimeError, ValueError, TypeError):
        return None

    if folder:
        raise CalibrationError(
            f"{_shown(name)} is a directory; give one file of texts ({', '.join(_SUFFIXES)})."
        )
    if exists:
        raise CalibrationError(f"{_shown(name)} is not a regular file.")
    return None


def _hub_samples(name: str, split: str, column: str, limit: int) -> list[Any] | None:
    dataset, split = _HUB_NAMES.get(name, (name, split))
    try:
        ask_hub_once()
        from datasets import load_dataset

        rows = list(islice(load_dataset(dataset, split=split, streaming=True), limit))
    # the hub fails in many ways: offline mode, DNS, missing dataset, HTTP errors
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        if name not in _HUB_NAMES:
            raise CalibrationError(
                f"calibration dataset {dataset}, split {split!r}, cannot be loaded ({reason}); "
                "give texts or a local file, or None for the bundled text."
            ) from error

        logger.warning(
            "calibration dataset %s cannot be loaded (%s); the bundled text takes its place.",
            dataset,
            reason,
        )
        return None

    columns = sorted({key for row in rows[:64] for key in row})
    column = _column_of(columns, column)
    if rows and column not in columns:
        raise CalibrationError(
            f"dataset {dataset} has no column {column!r}, only {columns}; give text_column."
        )

    samples = _only_samples(row.get(column) for row in rows)
    if not samples:
        raise CalibrationError(
            f"dataset {dataset} holds no text in column {column!r} of split {split!r}."
        )
    return samples


class _NoSuchColumn(Exception):
    """A table of a file lacks the column that was asked for; `columns` are those that it has."""

    def __init__(self, columns: Iterable[str]) -> None:
        super().__init__()
        self.columns = [str(name) for name in columns][:MAX_COLUMNS_SHOWN]


def file_texts(path: Path, column: str = "text", text_per_line: bool = False) -> list[str]:
    """Texts of a local file: paragraphs of .txt/.md, or one column of .jsonl, .json, .csv, .tsv or
    .parquet. text_per_line: lines of a .txt or .md without empty lines instead."""
    samples = file_samples(path, column, text_per_line)
    texts = [sample for sample in samples if isinstance(sample, str)]
    if not texts:
        raise CalibrationError(f"{path} holds no text.")
    return texts


def file_samples(path: Path, column: str = "text", text_per_line: bool = False) -> list[Any]:
    """Texts of a local file, or chats (lists of messages) of a .jsonl, .json or .parquet; as
    `file_texts` else."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CalibrationError(
                f"{path} is larger than {MAX_FILE_BYTES >> 30} GiB; a few hundred texts are enough."
            )
        if path.suffix.lower() == ".parquet":
            values = _parquet_column(path, column)
        else:
            values = _text_file_values(path, column, text_per_line)
    except CalibrationError:
        raise
    except _NoSuchColumn as error:
        raise CalibrationError(
            f"{path} has no column {column!r}, only {error.columns}; give text_column."
        ) from error
    # JSON's errors are ValueErrors
    except (csv.Error, TypeError, ValueError, OSError, RecursionError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeError) else first_line(error)
        raise CalibrationError(
            f"{path} cannot be read as calibration texts with column {column!r}: {reason}."
        ) from error

    samples = _only_samples(values)
    if not samples:
        raise CalibrationError(f"{path} holds no text.")
    return samples


def _text_file_values(path: Path, column: str, text_per_line: bool) -> list[object]:
    suffix = path.suffix.lower()
    # spreadsheets write a byte order mark, which would hide the first column
    text = path.read_text(encoding="utf-8-sig")
    if suffix in (".csv", ".tsv"):
        return _csv_column(text, column, "\t" if suffix == ".tsv" else ",")
    if suffix == ".jsonl":
        # Not splitlines(): JSON strings may hold U+2028 and its like, at which that would cut.
        return [_field(json.loads(line), column) for line in text.split("\n") if line.strip()]
    if suffix == ".json":
        return _json_values(json.loads(text), column)

    paragraphs = _EMPTY_LINE.split(text)
    if text_per_line and len([p for p in paragraphs if p.strip()]) == 1:
        return list(text.split("\n"))
    return list(paragraphs)


def _json_values(content: object, column: str) -> list[object]:
    """Of a list of rows, or of one object that holds a list for each column. Raises TypeError for
    anything else: names of keys and letters of a string would pass for texts."""
    if isinstance(content, list):
        return [_field(row, column) for row in content]
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}, not a list of rows")

    column = _column_of(content, column)
    if column not in content:
        raise _NoSuchColumn(content)

    values = content[column]
    if not isinstance(values, list):
        raise TypeError(f"it is one object whose {column!r} is no list; give a list of rows")
    return values


def _csv_column(text: str, column: str, delimiter: str) -> list[object]:
    """Values of a column. Raises ValueError for a column that is there twice, and for a quotation
    mark that is not closed: all that follows would be one text."""
    with _long_fields(len(text)):  # long samples are cut later, not refused here
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        return _csv_values(rows, column)


def _csv_values(rows: csv.DictReader, column: str) -> list[object]:
    try:
        names = list(rows.fieldnames or [])
        if names and column not in names:
            raise _NoSuchColumn(names)
        if names.count(column) > 1:
            raise ValueError("the header has that column twice")
        return [row[column] for row in rows]
    except csv.Error as error:
        raise ValueError(
            f"{error} in line {rows.reader.line_num}; a text with quotation marks stands in "
            "quotation marks, and those inside are doubled"
        ) from error


@contextmanager
def _long_fields(characters: int) -> Iterator[None]:
    """Tables may have fields of so many characters. The limit belongs to the process, so readers
    take turns."""
    with _limit_of_fields:
        before = csv.field_size_limit(max(characters, csv.field_size_limit()))
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _parquet_column(path: Path, column: str) -> list[object]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise CalibrationError(f"{path} needs pyarrow: pip install pyarrow.") from error

    columns = pyarrow.parquet.read_schema(path).names
    column = _column_of(columns, column)
    if column not in columns:
        raise _NoSuchColumn(columns)

    table = pyarrow.parquet.read_table(path, columns=[column])
    return table[column].to_pylist()


def _field(row: object, column: str) -> object:
    """A row's value in `column`. Texts and chats that stand in a file without a column are rows
    themselves."""
    if isinstance(row, (str, list)):
        return row
    if not isinstance(row, dict):
        raise TypeError(f"a row is {row!r}, neither a text nor an object with columns")

    column = _column_of(row, column)
    if column not in row:
        raise _NoSuchColumn(row)
    return row[column]


def _column_of(columns: Any, column: str) -> str:
    """`column`, or the column of chats when there is none of that name."""
    if column in columns:
        return column
    return next((name for name in CHAT_COLUMNS if name in columns), column)


def _only_samples(values: Iterable[object]) -> list[Any]:
    """Texts and chats. Empty and missing fields are common in datasets and say nothing."""
    return [
        v
        for v in values
        if (isinstance(v, str) and v.strip()) or (isinstance(v, (list, tuple)) and len(v) > 0)
    ]


def _shown(name: str | os.PathLike) -> str:
    text = os.fspath(name)
    return repr(text if len(text) <= 60 else text[:59] + "…")
