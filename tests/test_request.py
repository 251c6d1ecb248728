"""The table of what users may give as calibration data: every kind is read to the values it holds,
or refused in one line."""

import json
from collections import deque

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from awq.calibration import load_calibration, sources
from awq.calibration.request import CalibrationRequest, read_request, tell_apart
from awq.errors import CalibrationError

TEXTS = ["the cat runs", "a dog sleeps under the old tree"]
PAIRS = [("the cat", "a dog"), ("red", "blue")]
IDS = [[5, 6], [7, 8, 9]]
PADDED, MASK = [[5, 6, 0], [7, 8, 9]], [[1, 1, 0], [1, 1, 1]]
CHATS = [
    [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "runs"}],
    [{"role": "user", "content": "a dog"}],
]
RENDERED = ["user: the cat assistant: runs ", "user: a dog "]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"


def shared_gpt(chat):
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in chat]


def dataset(columns):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict(columns)


def frame(columns):
    return pytest.importorskip("pandas").DataFrame(columns)


def arrow(columns):
    return pytest.importorskip("pyarrow").table(columns)


TEXT_KINDS = {
    "list": lambda: TEXTS,
    "tuple": lambda: tuple(TEXTS),
    "set": lambda: set(TEXTS),
    "frozenset": lambda: frozenset(TEXTS),
    "generator": lambda: (t for t in TEXTS),
    "iterator": lambda: iter(TEXTS),
    "deque": lambda: deque(TEXTS),
    "values of a dict": lambda: {1: TEXTS[0], 2: TEXTS[1]}.values(),
    "with missing and empty ones": lambda: [TEXTS[0], None, "", "  ", TEXTS[1]],
    "array of strings": lambda: np.array(TEXTS),
    "array of objects": lambda: np.array(TEXTS, dtype=object),
    "list of array strings": lambda: list(np.array(TEXTS)),
    "pandas series": lambda: frame({"text": TEXTS})["text"],
    "pandas frame": lambda: frame({"text": TEXTS, "n": [1, 2]}),
    "dataset": lambda: dataset({"text": TEXTS, "n": [1, 2]}),
    "dataset that streams": lambda: dataset({"text": TEXTS}).to_iterable_dataset(),
    "column of a dataset": lambda: dataset({"text": TEXTS})["text"],
    "splits of a dataset": lambda: {
        "train": dataset({"text": TEXTS}),
        "test": dataset({"text": ["no"]}),
    },
    "arrow table": lambda: arrow({"text": TEXTS}),
    "rows of a table": lambda: [{"text": t, "n": 1} for t in TEXTS],
    "lists of three strings": lambda: [[*TEXTS, "not"]],
    "loader": lambda: DataLoader(TEXTS),
    "loader of two texts": lambda: DataLoader(TEXTS, batch_size=2),
    "loader of rows": lambda: DataLoader([{"text": t, "n": 1} for t in TEXTS], batch_size=2),
    "lone surrogates": lambda: [TEXTS[0] + "\ud800", TEXTS[1]],
}


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_texts(kind):
    request = read_request(TEXT_KINDS[kind]())
    want = sorted(TEXTS) if "set" in kind and "data" not in kind else TEXTS
    want = [*TEXTS, "not"] if "three" in kind else want
    assert (request.kind, request.texts, request.own) == ("texts", want, True)
    assert all(type(text) is str for text in request.texts)


ID_KINDS = {
    "lists": lambda: IDS,
    "tuples": lambda: tuple(map(tuple, IDS)),
    "ranges": lambda: [range(5, 7), range(7, 10)],
    "generator of lists": lambda: iter(IDS),
    "tensors [n]": lambda: [torch.tensor(row) for row in IDS],
    "tensors [1, n]": lambda: [torch.tensor([row]) for row in IDS],
    "int32 tensors": lambda: [torch.tensor(row, dtype=torch.int32) for row in IDS],
    "arrays": lambda: [np.array(row) for row in IDS],
    "arrays [1, n]": lambda: [np.array([row]) for row in IDS],
    "unsigned arrays": lambda: [np.array(row, dtype=np.uint16) for row in IDS],
    "lists of numpy integers": lambda: [[np.int32(i) for i in row] for row in IDS],
    "one tensor": lambda: torch.tensor(PADDED),
    "one array": lambda: np.array(PADDED),
    "an output": lambda: {"input_ids": torch.tensor(PADDED), "attention_mask": torch.tensor(MASK)},
    "an output of arrays": lambda: {
        "input_ids": np.array(PADDED),
        "attention_mask": np.array(MASK),
    },
    "a loader of outputs": lambda: DataLoader(
        [{"input_ids": r, "attention_mask": m} for r, m in zip(*map(torch.tensor, (PADDED, MASK)))],
        batch_size=2,
    ),
    "an output without padding": lambda: {"input_ids": IDS, "attention_mask": [[1, 1], [1, 1, 1]]},
    "outputs": lambda: [
        {"input_ids": row, "attention_mask": mask} for row, mask in zip(PADDED, MASK)
    ],
    "a tokenized dataset": lambda: dataset({"input_ids": PADDED, "attention_mask": MASK}),
}


@pytest.mark.parametrize("kind", ID_KINDS)
def test_ids(kind):
    request = read_request(ID_KINDS[kind](), pad_id=0)
    assert (request.kind, [row["input_ids"] for row in request.rows]) == ("ids", IDS)
    assert request.whole_rows == kind.startswith("one")
    assert all(type(i) is int for row in request.rows for i in row["input_ids"])


def test_one_row_of_ids():
    for data in (
        [5, 6, 7],
        (5, 6, 7),
        torch.tensor([5, 6, 7]),
        np.array([5, 6, 7]),
        [np.int64(5), np.int64(6), np.int64(7)],
    ):
        assert [row["input_ids"] for row in read_request(data).rows] == [[5, 6, 7]]


CHAT_KINDS = {
    "lists of messages": lambda: CHATS,
    "tuples": lambda: tuple(map(tuple, CHATS)),
    "ShareGPT's names": lambda: [shared_gpt(chat) for chat in CHATS],
    "column messages": lambda: [{"messages": chat} for chat in CHATS],
    "column conversations": lambda: [{"conversations": shared_gpt(chat)} for chat in CHATS],
    "dataset": lambda: dataset({"messages": CHATS}),
}


@pytest.mark.parametrize("kind", CHAT_KINDS)
def test_chats(kind):
    from conftest import make_tokenizer

    data = CHAT_KINDS[kind]()
    assert read_request(data).kind == "chats", "a tokenizer makes them texts"
    tokenizer = make_tokenizer()
    with pytest.raises(CalibrationError, match="chat template"):
        read_request(data, tokenizer=tokenizer)
    tokenizer.chat_template = TEMPLATE
    assert read_request(data, tokenizer=tokenizer).texts == RENDERED
    assert read_request(tokenizer, data).texts == RENDERED


def test_one_chat_is_one_text(tokenizer):
    assert len(read_request(CHATS[0]).chats) == 1


def test_a_template_that_fails(tokenizer):
    from conftest import make_tokenizer

    broken = make_tokenizer()
    broken.chat_template = "{{ raise_exception('roles must alternate\\nand more') }}"
    with pytest.raises(CalibrationError, match="roles must alternate$"):
        read_request(CHATS, tokenizer=broken)


ENDLESS = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{{ a }}"
    "{% endfor %}{% endfor %}{% endfor %}"
)


def test_a_template_that_does_not_end(monkeypatch):
    """It is stopped in any thread, and the debugger's or coverage's tracing is as before."""
    import sys
    from concurrent.futures import ThreadPoolExecutor

    from conftest import make_tokenizer

    from awq.calibration import templates
    from awq.calibration.batches import rendered_chats

    monkeypatch.setattr(templates, "MAX_SECONDS", 0.2)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ENDLESS
    before = sys.gettrace()
    with ThreadPoolExecutor(1) as other:
        for run in (lambda work: work(), lambda work: other.submit(work).result()):
            with pytest.raises(CalibrationError, match="did not end within 0.2 s"):
                run(lambda: read_request(CHATS, tokenizer=tokenizer))
    assert rendered_chats(tokenizer) == []
    assert sys.gettrace() is before


TABLES = {
    "dataset": lambda columns: dataset(columns),
    "dataset that streams": lambda columns: dataset(columns).to_iterable_dataset(),
    "split of a dataset": lambda columns: {"train": dataset(columns)},
    "pandas frame": lambda columns: frame(columns),
    "arrow table": lambda columns: arrow(columns),
    "list of dicts": lambda columns: rows_of(columns),
    "tuple of dicts": lambda columns: tuple(rows_of(columns)),
    "generator of dicts": lambda columns: (row for row in rows_of(columns)),
}
COLUMNS = {
    "text": TEXTS,
    "body": TEXTS,
    "input_ids": IDS,
    "messages": CHATS,
    "conversations": [shared_gpt(chat) for chat in CHATS],
}


def rows_of(columns):
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("table", TABLES)
def test_every_column_of_every_table(table, column):
    """Beside a column that nobody asked for; the text column wins over the others."""
    from conftest import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    data = TABLES[table]({column: COLUMNS[column], "label": [0, 1]})
    name = column if column in ("text", "body") else "text"
    request = read_request(data, tokenizer=tokenizer, text_column=name)
    if column == "input_ids":
        assert [row["input_ids"] for row in request.rows] == IDS
    else:
        assert request.texts == (TEXTS if column in ("text", "body") else RENDERED)


def write_texts(path):
    """Two texts in a file of the kind that its suffix names."""
    import json

    rows = rows_of({"text": TEXTS})
    written = {
        ".txt": lambda: path.write_text("\n\n".join(TEXTS)),
        ".md": lambda: path.write_text("\n\n".join(TEXTS)),
        ".jsonl": lambda: path.write_text("\n".join(map(json.dumps, rows))),
        ".json": lambda: path.write_text(json.dumps(rows)),
        ".csv": lambda: path.write_text("\n".join(["text", *TEXTS])),
        ".tsv": lambda: path.write_text("\n".join(["n\ttext", *[f"1\t{t}" for t in TEXTS]])),
        ".parquet": lambda: frame({"text": TEXTS}).to_parquet(path),
    }
    written[path.suffix]()
    return path


@pytest.mark.parametrize("suffix", sources._SUFFIXES)
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_every_kind_of_file(tmp_path, suffix, kind):
    request = read_request(kind(write_texts(tmp_path / f"texts{suffix}")))
    assert (request.kind, request.texts, request.own) == ("texts", TEXTS, True)


@pytest.mark.parametrize("nothing", [None, "pileval"])
def test_nothing_is_the_bundled_text(nothing, monkeypatch):
    """No data, and the default's name where there is no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    request = read_request(nothing)
    assert (request.kind, request.samples, request.own) == ("bundled", [], False)


# What the table of `awq.calibration.request` names → (what is given, what is read of it).
NAMED = {
    "None": (lambda: None, "bundled", []),
    '"pileval" without a network': (lambda: "pileval", "bundled", []),
    "a file's path": (None, "texts", TEXTS),
    "the name of a dataset on the hub": (lambda: "owner/texts", "texts", TEXTS),
    "an iterable of strings": (lambda: deque(TEXTS), "texts", TEXTS),
    "list": (lambda: list(TEXTS), "texts", TEXTS),
    "tuple": (lambda: tuple(TEXTS), "texts", TEXTS),
    "set": (lambda: set(TEXTS), "texts", sorted(TEXTS)),
    "generator": (lambda: (t for t in TEXTS), "texts", TEXTS),
    "numpy array": (lambda: np.array(TEXTS), "texts", TEXTS),
    "pandas Series": (lambda: frame({"a": TEXTS})["a"], "texts", TEXTS),
    "DataLoader": (lambda: DataLoader(TEXTS, batch_size=2), "texts", TEXTS),
    "an iterable of chats": (lambda: iter(CHATS), "chats", CHATS),
    "each a list of messages": (lambda: [list(chat) for chat in CHATS], "chats", CHATS),
    "a table": (lambda: arrow({"text": TEXTS, "n": [1, 2]}), "texts", TEXTS),
    "datasets.Dataset": (lambda: dataset({"text": TEXTS}), "texts", TEXTS),
    "pandas.DataFrame": (lambda: frame({"text": TEXTS}), "texts", TEXTS),
    "an iterable of dicts": (lambda: iter([{"text": t} for t in TEXTS]), "texts", TEXTS),
    "an iterable of pairs of strings": (lambda: iter(PAIRS), "pairs", PAIRS),
    "{prompt name: texts}": (lambda: {"query": TEXTS}, "prompts", TEXTS),
    "token ids": (lambda: iter(IDS), "ids", IDS),
    "tensors": (lambda: [torch.tensor(row) for row in IDS], "ids", IDS),
    "arrays": (lambda: [np.array(row) for row in IDS], "ids", IDS),
    "lists of integers": (lambda: IDS, "ids", IDS),
    "outputs of a tokenizer": (
        lambda: {"input_ids": torch.tensor(PADDED), "attention_mask": torch.tensor(MASK)},
        "ids",
        IDS,
    ),
}


def named_in_the_table():
    """The kinds that the left column of the module's own table names."""
    import re

    from awq.calibration import request

    lines = request.__doc__.split("    ----", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    left = [line[4:59] for line in lines]  # the column is as wide as the line above it
    rows = " ".join(line if line.startswith(" ") else f"; {line}" for line in left)
    parts = re.split(r"; |, or |, |: (?![^{]*})", " ".join(rows.split()))
    return [part.strip(" ,;") for part in parts if part.strip(" ,;")]


def test_every_kind_of_the_table_is_read_to_its_values(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    library = pytest.importorskip("datasets")
    load = library.load_dataset

    def hub(name, **options):
        return [{"text": t} for t in TEXTS] if name == "owner/texts" else load(name, **options)

    monkeypatch.setattr(library, "load_dataset", hub)
    named = named_in_the_table()
    missing = [name for name in named if name not in NAMED]
    assert len(named) > 20 and not missing, missing
    for name in named:
        make, kind, values = NAMED[name]
        request = read_request(make() if make else write_texts(tmp_path / "texts.txt"))
        found = [r["input_ids"] for r in request.rows] if kind == "ids" else request.samples
        assert (request.kind, list(found)) == (kind, list(values)), name
    print(f"{len(named)} of {len(named)} kinds of the table read to their values")


def test_pairs_and_prompts():
    assert read_request(PAIRS).pairs == read_request([list(p) for p in PAIRS]).pairs == PAIRS
    request = read_request({"query": TEXTS, "document": np.array(["red"]), "pair": PAIRS})
    assert request.kind == "prompts"
    assert request.prompts == {
        "query": TEXTS,
        "document": ["red"],
        "pair": ["the cat", "a dog", "red", "blue"],
    }
    assert request.samples == [*TEXTS, "red", "the cat", "a dog", "red", "blue"]


def test_files(tmp_path):
    from conftest import make_tokenizer

    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(TEXTS) + "\n")
    assert read_request(lines, text_per_line=True).texts == TEXTS
    assert read_request(str(lines)).texts == ["\n".join(TEXTS) + "\n"]
    paragraphs = tmp_path / "paragraphs.txt"
    paragraphs.write_text("one\ntwo\n \t\nthree")
    assert read_request(paragraphs, text_per_line=True).texts == ["one\ntwo", "three"]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(__import__("json").dumps({"messages": chat}) for chat in CHATS))
    for column in ("text", "messages"):
        assert read_request(chats, tokenizer=tokenizer, text_column=column).texts == RENDERED


def test_a_request_is_read_once(tokenizer):
    request = read_request(TEXTS)
    assert read_request(request) is request
    assert isinstance(request, CalibrationRequest)
    again = load_calibration(request.with_tokenizer(tokenizer), tokenizer, mode="rows")
    direct = load_calibration(TEXTS, tokenizer, mode="rows")
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(again, direct))


def test_which_argument_is_which(tokenizer):
    assert tell_apart(tokenizer, TEXTS) == (TEXTS, tokenizer)
    assert tell_apart(TEXTS, "pileval", tokenizer) == (TEXTS, tokenizer), (
        "the default does not count as given"
    )
    assert tell_apart(None, TEXTS, tokenizer) == (TEXTS, tokenizer)
    assert tell_apart(None) == (None, None)
    assert tell_apart(TEXTS, PAIRS) == (TEXTS, None), "the first argument wins"


REFUSED = {
    "number": (7, "int"),
    "bytes": (b"the cat", "bytes"),
    "object": (object(), "object"),
    "tokenizer that is a number": (5, "int"),
    "list of objects": ([object()], "object"),
    "list of numbers": ([1.5], "float"),
    "list of bytes": ([b"a"], "bytes"),
    "strings and ids": (["the cat", [4, 5]], "mixes strings and token ids"),
    "strings and dicts": (["the cat", {"text": "a"}], "mixes strings and dicts"),
    "floats": ([[0.5, 1.0]], "integers"),
    "float tensor": (torch.rand(2, 3), "integers"),
    "complex tensor": (torch.zeros(2, 3, dtype=torch.complex64), "integers"),
    "bools": (torch.ones(2, 3, dtype=torch.bool), "integers"),
    "number in a tensor": (torch.tensor(5), "integers"),
    "three dimensions": (torch.zeros(2, 2, 2, dtype=torch.long), "integers"),
    "meta tensor": (torch.zeros(2, 3, dtype=torch.long, device="meta"), "meta"),
    "sparse tensor": (torch.ones(2, 3, dtype=torch.long).to_sparse(), "left out"),
    "masked array": (np.ma.array([[1, 2]], mask=[[0, 1]]), "left out"),
    "a class": (str, "calibration data is type"),
    "a view of bytes": (memoryview(b"the cat"), "memoryview"),
    "negative": ([[4, -100]], "negative"),
    "huge": ([[2**70]], "token ids"),
    "ragged list of lists": ([[[1], [2, 3]]], "token ids"),
    "mask of another shape": (
        {"input_ids": [[1, 2]], "attention_mask": [[1]]},
        "attention_mask has shape",
    ),
    "mask that is NaN": ({"input_ids": [[1, 2]], "attention_mask": [[float("nan"), 1]]}, "finite"),
    "mask of words": ({"input_ids": [[1, 2]], "attention_mask": [["a", "b"]]}, "attention_mask"),
    "types of another shape": (
        {"input_ids": [[1, 2]], "token_type_ids": [[0]]},
        "token_type_ids has shape",
    ),
    "dict without ids": ([{"ids": [4]}], "no input_ids"),
    "mapping of numbers": ({"a": 1}, "no input_ids"),
    "empty mapping": ({}, "empty mapping"),
    "prompt with ids": ({"query": [[1, 2]]}, "list of texts"),
    "prompt with one string": ({"query": "the cat"}, "list of texts"),
    "one long string": ("the cat " * 2000, "one string"),
    "one sentence": ("The cat runs over the river.", "one string"),
    "unknown user": ("~nobody-of-that-name/x", "does not exist"),
    "zero byte": ("a\0b", "one string"),
    "unknown dataset": ("no-such-dataset-anywhere", "cannot be loaded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_short_line(case):
    data, match = REFUSED[case]
    with pytest.raises(CalibrationError, match=match) as caught:
        read_request(data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("options", [{"split": 5}, {"split": ""}, {"text_column": None}])
def test_names_are_names(options):
    with pytest.raises(CalibrationError, match="give a name"):
        read_request(TEXTS, **options)


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, None, 1 << 30])
@pytest.mark.parametrize("name", ["max_samples", "max_length"])
def test_counts_are_whole_numbers_in_range(name, value, tokenizer):
    with pytest.raises(CalibrationError, match=f"{name} is .*whole number"):
        load_calibration(TEXTS, tokenizer, **{name: value})


def test_missing_column_and_split():
    with pytest.raises(CalibrationError, match=r"no column 'body', only \['text'\]"):
        read_request(dataset({"text": TEXTS}), text_column="body")
    with pytest.raises(CalibrationError, match="no split 'dev'"):
        read_request({"train": dataset({"text": TEXTS})}, split="dev")


def test_an_endless_generator_ends(monkeypatch):
    from itertools import repeat

    assert len(read_request(repeat("the cat")).texts) == 100_000


def test_a_json_file_is_rows_or_columns(tmp_path):
    """Names of keys and letters of a string are no texts."""
    path = tmp_path / "t.json"
    for content in (TEXTS, [{"text": t} for t in TEXTS], {"n": [1, 2], "text": TEXTS}):
        path.write_text(json.dumps(content))
        assert read_request(path).texts == TEXTS
    refused = {
        "no column 'text', only": {"version": 1, "data": TEXTS},
        "whose 'text' is no list": {"text": TEXTS[0]},
        "holds a str": TEXTS[0],
        "holds a int": 5,
        "holds a NoneType": None,
    }
    for match, content in refused.items():
        path.write_text(json.dumps(content))
        with pytest.raises(CalibrationError, match=match):
            read_request(path)


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("t.csv", 'text,n\n"the cat,1\na dog,2\n', "unexpected end of data in line 3"),
        ("t.tsv", 'text\tn\n"the cat" runs\t1\n', "in line 2.*doubled"),
        ("t.csv", "text,text\nthe cat,1\n", "column twice"),
    ],
)
def test_tables_whose_quotation_marks_or_columns_are_not_clear(name, content, match, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=match):
        read_request(tmp_path / name)
    (tmp_path / "t.csv").write_text('text,n\n"the ""cat"", runs",1\n')
    assert read_request(tmp_path / "t.csv").texts == ['the "cat", runs']


@pytest.mark.parametrize(
    "content, match", [(bytes(range(256)) * 20, "UTF-8"), (b"[" * 100_000, "cannot be read")]
)
def test_broken_files(content, match, tmp_path):
    path = tmp_path / ("t.json" if content[:1] == b"[" else "t.txt")
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=match) as caught:
        read_request(path)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_what_exists_and_is_no_file(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CalibrationError, match="not a regular file"):
        read_request(tmp_path / "pipe")
    with pytest.raises(CalibrationError, match="is a directory"):
        read_request(tmp_path)


def test_a_file_that_is_one_long_text_is_told(tmp_path, tokenizer, caplog):
    load_calibration([" ".join(TEXTS) * 200], tokenizer, mode="rows", max_length=16)
    assert "cut away" in caplog.text
    caplog.clear()
    load_calibration(TEXTS * 4, tokenizer, mode="rows", max_length=16)
    assert not caplog.text
