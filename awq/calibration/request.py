"""What users give as calibration data, turned into one of six kinds.

People hold calibration data in many ways: lists of strings, a column of a dataset, chat messages, a
file, token ids of a tokenizer. `read_request` is the one place that knows them all (messages are
read by `chats`, token ids by `ids`). Everything behind it sees a `CalibrationRequest`:

    given                                                    kind
    -------------------------------------------------------  ---------
    None, or "pileval" without a network                     "bundled"
    a file's path, the name of a dataset on the hub          "texts"
    an iterable of strings: list, tuple, set, generator,     "texts"
        numpy array, pandas Series, DataLoader
    an iterable of chats, each a list of messages            "chats"; "texts" with a tokenizer, by
                                                             its chat template
    a table: datasets.Dataset, pandas.DataFrame,             what its column `text_column` holds;
        an iterable of dicts                                 else its columns input_ids, messages or
                                                             conversations
    an iterable of pairs of strings                          "pairs"
    {prompt name: texts}                                     "prompts"
    token ids: tensors, arrays, lists of integers,           "ids"
        outputs of a tokenizer

Whatever fits no line is refused with one sentence that names what was given. Nothing is guessed: a
string that is neither a file nor the form of a dataset's name is an error, not a dataset that
happens to be missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from awq.calibration.chats import chat_text, is_message, turn
from awq.calibration.cleaning import repaired
from awq.calibration.ids import id_rows, integers, is_integer, shown, unpadded
from awq.calibration.sources import CHAT_COLUMNS, named_samples
from awq.calibration.tokens import Row, as_row
from awq.errors import CalibrationError

MAX_SAMPLES_READ = 100_000  # of an iterable; an endless generator ends here


@dataclass(frozen=True)
class CalibrationRequest:
    """Calibration data of one kind, read and checked.

    kind: "texts", "chats", "pairs", "prompts", "ids", or "bundled": nothing was given, and the text
        that ships with the package is meant.
    texts: of kind "texts".
    chats: lists of messages that still need a tokenizer (`with_tokenizer`), of kind "chats".
    pairs: of kind "pairs".
    prompts: texts by prompt name, of kind "prompts".
    rows: token ids without padding, of kind "ids".
    whole_rows: the ids came as one [samples, tokens] tensor, whose rows stay rows when other ids
    would be joined.
    tokenizer: the one that was given, or None.
    own: the texts are the user's own, from memory or a file, and not a general dataset.
    """

    kind: str
    texts: list[str] = field(default_factory=list)
    chats: list[list[dict[str, Any]]] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    prompts: dict[str, list[str]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    whole_rows: bool = False
    tokenizer: Any = None
    own: bool = True

    @property
    def samples(self) -> Sequence[Any]:
        """What `kind` says the request holds: texts, pairs, all texts of all prompts, or rows of
        ids."""
        if self.kind == "prompts":
            return [text for texts in self.prompts.values() for text in texts]

        held: dict[str, list[Any]] = {
            "texts": self.texts,
            "chats": self.chats,
            "pairs": self.pairs,
            "ids": self.rows,
        }
        return held.get(self.kind, [])

    def with_tokenizer(self, tokenizer: Any) -> CalibrationRequest:
        """The same request with a tokenizer; chats become texts. Raises CalibrationError when it
        has no chat template."""
        if self.kind != "chats":
            return replace(self, tokenizer=tokenizer)
        texts = [chat_text(chat, tokenizer) for chat in self.chats]
        return replace(self, kind="texts", texts=texts, chats=[], tokenizer=tokenizer)


def read_request(
    first: Any,
    second: Any = None,
    tokenizer: Any = None,
    *,
    split: str = "train",
    text_column: str = "text",
    text_per_line: bool = False,
    pad_id: int | None = None,
    limit: int = MAX_SAMPLES_READ,
) -> CalibrationRequest:
    """The calibration data among the first arguments of `quantize`, whatever their order.

    first: a tokenizer or calibration data; second: calibration data, or None; tokenizer: taken when
    neither holds one.
    split, text_column: of datasets and tables. text_per_line: a text file without empty lines is
    one text per line (for encoders, which never join texts). pad_id: padding of bare id tensors;
    None: they have none.
    limit: samples read of a dataset of the hub.
    Raises CalibrationError, with one line, when the data is of no known kind.

    >>> read_request(["the cat", "a dog"]).texts
    ['the cat', 'a dog']
    >>> read_request(None).kind
    'bundled'
    """
    data, tokenizer = tell_apart(first, second, tokenizer)
    if isinstance(data, CalibrationRequest):
        return data

    for name, value in (("split", split), ("text_column", text_column)):
        if not isinstance(value, str) or not value:
            raise CalibrationError(f"{name} is {value!r}; give a name.")

    reader = _Reader(split, text_column, pad_id)
    own = True
    if isinstance(data, (str, os.PathLike)):
        data, own = named_samples(data, split, text_column, limit, text_per_line)

    request = reader.read(data, own)
    return request if tokenizer is None else request.with_tokenizer(tokenizer)


def tell_apart(first: Any, second: Any = None, tokenizer: Any = None) -> tuple[Any, Any]:
    """(calibration data, tokenizer) of `quantize(first, calib_data=second)`.

    AutoAWQ's first argument is the tokenizer; guides for embedding models put the data there. Only
    tokenizers can be called. Data in the first argument wins over `second`, whose default always
    stands there.
    """
    if first is None:
        return second, tokenizer
    if is_tokenizer(first):
        return second, first
    return first, tokenizer


def is_tokenizer(value: Any) -> bool:
    """Whether `value` can turn texts into ids: it can be called, and it is neither data nor a
    class."""
    return callable(value) and not isinstance(value, (str, Mapping, Tensor, np.ndarray, type))


class _Reader:
    """Reads data of any kind; holds what is the same for all of it."""

    def __init__(self, split: str, column: str, pad_id: int | None) -> None:
        self.split = split
        self.column = column
        self.pad_id = pad_id

    def read(self, data: Any, own: bool = True) -> CalibrationRequest:
        if data is None:
            return CalibrationRequest("bundled", own=False)
        if isinstance(data, Mapping):
            return self._mapping(data, own)
        if isinstance(data, (Tensor, np.ndarray)):
            return self._array(data, own)
        return self._items(self._listed(data), own)

    def _mapping(self, data: Mapping, own: bool) -> CalibrationRequest:
        """A tokenizer's output, the splits of a dataset, or texts by prompt name."""
        if "input_ids" in data:
            return self._ids(unpadded(data, self.pad_id))
        if data and all(_columns(part) is not None for part in data.values()):
            if self.split not in data:
                raise CalibrationError(
                    f"the dataset has no split {self.split!r}, only {shown(data)}; give split."
                )
            return self.read(data[self.split], own)

        prompts = {}
        for name, texts in data.items():
            if isinstance(texts, (str, Mapping)) or not isinstance(texts, Iterable):
                raise CalibrationError(
                    f"calibration data is a mapping with keys {shown(data)} but no input_ids, "
                    f"and {str(name)!r} holds "
                    f"{type(texts).__name__}; give a tokenizer's output, or a list of texts for "
                    "each prompt name."
                )

            found = self.read(texts, own)
            if found.kind not in ("texts", "pairs"):
                raise CalibrationError(
                    f"prompt {str(name)!r} holds {found.kind}; give a list of texts."
                )
            prompts[str(name)] = found.texts or [text for pair in found.pairs for text in pair]

        if not prompts:
            raise CalibrationError("calibration data is an empty mapping; give texts or token ids.")
        return CalibrationRequest("prompts", prompts=prompts, own=own)

    def _array(self, data: Tensor | np.ndarray, own: bool) -> CalibrationRequest:
        """Ids as one tensor or array, or an array of strings or other objects."""
        if isinstance(data, np.ndarray) and data.dtype.kind in "OUST" and data.ndim:
            return self._items(data.tolist(), own)

        ids = integers(data)
        if ids.dim() == 2:
            return self._ids(unpadded({"input_ids": ids}, self.pad_id), whole_rows=True)
        return self._ids([as_row(ids.tolist())])

    def _listed(self, data: Any) -> list[Any]:
        """The samples of a table or an iterable."""
        columns = _columns(data)
        if columns is not None:
            column = self._column_of(columns)
            if hasattr(data, "iloc") or hasattr(data, "to_pylist"):  # pandas, pyarrow
                values = data[column]
                if hasattr(values, "to_pylist"):
                    return values.to_pylist()
                return values.tolist()
            return [self._cell(row, column) for row in islice(data, MAX_SAMPLES_READ)]

        iterable = isinstance(data, Iterable) or hasattr(data, "__getitem__")
        if isinstance(data, (bytes, bytearray, memoryview, str, type)) or not iterable:
            raise CalibrationError(
                f"calibration data is {type(data).__name__}; give texts, token ids, a file or a "
                "dataset name."
            )

        items = list(islice(data, MAX_SAMPLES_READ))
        if isinstance(data, DataLoader):
            items = [sample for batch in items for sample in self._unbatched(batch)]
        # sets have no order of their own
        return sorted(items, key=repr) if isinstance(data, (set, frozenset)) else items

    def _unbatched(self, batch: Any) -> Iterable[Any]:
        """The samples of a DataLoader's batch. Two texts in one are no pair."""
        texts = batch.get(self.column) if isinstance(batch, Mapping) else batch
        if isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts):
            return texts

        return [batch]

    def _column_of(self, columns: Sequence[str]) -> str:
        for name in (self.column, "input_ids", *CHAT_COLUMNS):
            if name in columns:
                return name
        raise CalibrationError(
            f"the dataset has no column {self.column!r}, only {shown(columns)}; give text_column."
        )

    @staticmethod
    def _cell(row: Mapping, column: str) -> Any:
        """A row's value in `column`; of a tokenized dataset the row itself, whose mask counts
        too."""
        return dict(row) if column == "input_ids" else row.get(column)

    def _items(self, items: list[Any], own: bool) -> CalibrationRequest:
        """Samples that must all be of one kind. Missing ones say nothing."""
        items = [item for item in items if item is not None]
        if items and all(is_integer(item) for item in items):
            return self._ids([as_row([int(item) for item in items])])

        if items and all(is_message(item) for item in items):
            items = [items]  # one chat, not a list of them
        kinds = dict.fromkeys(_kind_of(item) for item in items)
        if len(kinds) > 1:
            raise CalibrationError(f"calibration data mixes {' and '.join(kinds)}; give one kind.")

        kind = next(iter(kinds), "texts")
        read: dict[str, Callable[[list[Any], bool], CalibrationRequest]] = {
            "strings": self._texts,
            "pairs": self._pairs,
            "lists of strings": self._string_lists,
            "chats": self._chats,
            "dicts": self._dicts,
        }
        if kind in read:
            return read[kind](items, own)
        return self._ids([as_row(row) for item in items for row in id_rows(item)])

    def _texts(self, items: list[Any], own: bool) -> CalibrationRequest:
        texts = [repaired(item) for item in items]
        return CalibrationRequest("texts", texts=[t for t in texts if t.strip()], own=own)

    def _pairs(self, items: list[Any], own: bool) -> CalibrationRequest:
        pairs = [(repaired(first), repaired(second)) for first, second in items]
        pairs = [pair for pair in pairs if any(part.strip() for part in pair)]
        return CalibrationRequest("pairs", pairs=pairs, own=own)

    def _string_lists(self, items: list[Any], own: bool) -> CalibrationRequest:
        """Triplets and longer: each string is a text."""
        return self._texts([text for item in items for text in item], own)

    def _chats(self, items: list[Any], own: bool) -> CalibrationRequest:
        return CalibrationRequest(
            "chats", chats=[[turn(message) for message in item] for item in items], own=own
        )

    def _dicts(self, items: list[Mapping], own: bool) -> CalibrationRequest:
        """Rows of a table, or outputs of a tokenizer."""
        columns = list(dict.fromkeys(str(key) for item in items[:64] for key in item))
        if "input_ids" in columns and self.column not in columns:
            return self._ids([row for item in items for row in unpadded(item, self.pad_id)])

        try:
            column = self._column_of(columns)
        except CalibrationError as error:
            raise CalibrationError(
                f"calibration samples have keys {shown(columns)} but no input_ids and no column "
                f"{self.column!r}; give text_column."
            ) from error

        return self._items([item.get(column) for item in items], own)

    def _ids(self, rows: list[Row], whole_rows: bool = False) -> CalibrationRequest:
        rows = [row for row in rows if row["input_ids"]]
        if any(min(row["input_ids"]) < 0 for row in rows):
            raise CalibrationError(
                "calibration ids are negative; use an attention mask to leave tokens out."
            )
        return CalibrationRequest("ids", rows=rows, whole_rows=whole_rows)


def _kind_of(item: Any) -> str:
    if isinstance(item, str):
        return "strings"
    if isinstance(item, Mapping):
        return "dicts"

    if isinstance(item, (list, tuple)) and item:
        texts = [isinstance(part, str) for part in item]
        if all(texts):
            is_pair = len(item) == 2
            return "pairs" if is_pair else "lists of strings"
        if all(is_message(part) for part in item):
            return "chats"

    if isinstance(item, (Tensor, np.ndarray, list, tuple, range)):
        return "token ids"
    raise CalibrationError(f"a calibration sample is {type(item).__name__}, not token ids or text.")


def _columns(data: Any) -> list[str] | None:
    """Column names of a table (datasets, pandas, pyarrow); None for anything else."""
    if isinstance(data, (Mapping, list, tuple, str)):
        return None

    names = getattr(data, "column_names", None)
    if names is None and hasattr(data, "iloc"):
        names = getattr(data, "columns", None)
    # a streamed dataset whose columns are not known yet
    if names is None and hasattr(data, "features"):
        first = next(iter(data), None)
        names = list(first) if isinstance(first, Mapping) else None

    return None if names is None else [str(name) for name in names]
