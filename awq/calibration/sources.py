"""Where calibration texts come from: a local file, a dataset of the hub, or the text bundled with the package."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterable
from importlib import resources
from itertools import islice
from pathlib import Path

from awq.errors import CalibrationError

logger = logging.getLogger("awq.calibration")

_HUB_NAMES = {"pileval": ("mit-han-lab/pile-val-backup", "validation")}
_SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".csv", ".tsv", ".parquet")


def bundled_texts() -> list[str]:
    """Passages of the small public-domain multilingual text that ships with the package."""
    text = resources.files("awq.calibration").joinpath("data/passages.txt").read_text(encoding="utf-8")
    return [p.strip() for p in text.split("\n\n") if p.strip()]


def named_texts(name: str, split: str, column: str, limit: int) -> list[str]:
    """Texts of a local file or a hub dataset; the bundled text, with a warning, when the hub cannot be reached.

    Raises CalibrationError for a file that is missing, empty or has no such column.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return file_texts(path, column)
    if path.suffix.lower() in _SUFFIXES:
        raise CalibrationError(f"calibration file {name} does not exist.")
    dataset, split = _HUB_NAMES.get(name, (name, split))
    try:
        from datasets import load_dataset

        rows = load_dataset(dataset, split=split, streaming=True)
        return [row[column] for row in islice(rows, limit)]
    except KeyError as error:
        raise CalibrationError(f"dataset {dataset} has no column {column!r}; give text_column.") from error
    except Exception as error:  # the hub fails in many ways: offline mode, DNS, missing dataset, HTTP errors
        logger.warning(
            "calibration dataset %s cannot be loaded (%s: %s); using the bundled text. Texts of your own task give better results.",
            dataset, type(error).__name__, str(error).splitlines()[0] if str(error) else "",
        )  # fmt: skip
        return bundled_texts()


def file_texts(path: Path, column: str = "text") -> list[str]:
    """Texts of a local file: paragraphs of .txt/.md, or one column of .jsonl, .json, .csv, .tsv or .parquet."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path, columns=[column])[column].to_pylist()
        text = path.read_text(encoding="utf-8")
        if suffix in (".csv", ".tsv"):
            rows: Iterable[dict] = csv.DictReader(text.splitlines(), delimiter="\t" if suffix == ".tsv" else ",")
            texts = [row[column] for row in rows]
        elif suffix == ".jsonl":
            texts = [_field(json.loads(line), column) for line in text.splitlines() if line.strip()]
        elif suffix == ".json":
            texts = [_field(row, column) for row in json.loads(text)]
        else:
            texts = text.split("\n\n")
    except (KeyError, json.JSONDecodeError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise CalibrationError(f"{path} cannot be read as calibration texts with column {column!r}: {error!r}.") from error
    texts = [t for t in texts if isinstance(t, str) and t.strip()]
    if not texts:
        raise CalibrationError(f"{path} holds no text.")
    return texts


def _field(row: object, column: str) -> str:
    return row if isinstance(row, str) else row[column]  # type: ignore[index]
