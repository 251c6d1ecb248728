"""Calibration data of every kind becomes masked batches: long samples are cut, padding is never
real, errors are clear."""

import json
import logging
import warnings

import numpy as np
import pytest
import torch
from conftest import make_tokenizer

from awq.calibration import CalibrationBatch, load_calibration, prepare_calibration_tokens
from awq.calibration.batches import (
    GENERAL_SHARE,
    MAX_WEIGHT,
    general_texts,
    rebatched,
    rendered_chats,
    spelled_texts,
    with_general_rows,
)
from awq.calibration.sources import (
    bundled_chats,
    bundled_texts,
    bundled_tool_chats,
    file_texts,
    named_samples,
)
from awq.calibration.tokens import tokenize
from awq.errors import CalibrationError

# 320 words, over the tokenizer's limit of 64
LONG = " ".join(["the quick cat runs over the old river"] * 40)


def real_rows(batches):
    """The unpadded rows of all batches, as sorted lists."""
    return sorted(
        ids[mask.bool()].tolist()
        for b in batches
        for ids, mask in zip(b.input_ids, b.attention_mask)
    )


def tokens(batches):
    return int(sum(b.attention_mask.sum() for b in batches))


def test_batch_is_what_a_model_takes():
    batch = CalibrationBatch(
        torch.ones(1, 3).long(),
        torch.ones(1, 3).long(),
        {"token_type_ids": torch.zeros(1, 3).long()},
    )
    assert set(batch.model_inputs()) == {"input_ids", "attention_mask", "token_type_ids"}
    for b in load_calibration([[4, 5, 6], [7, 8]], mode="rows"):
        assert (
            b.input_ids.dtype == b.attention_mask.dtype == torch.int64
            and b.input_ids.shape == b.attention_mask.shape
        )


# --- AutoAWQ's defect 8: long samples dropped, a crash when all are long, frightening warnings ---


def test_long_samples_are_cut_not_dropped(tokenizer):
    batches = load_calibration([LONG, LONG], tokenizer, max_length=32)
    assert tokens(batches) == 640, "every token of samples ten times too long is used"
    assert all(b.input_ids.shape[1] == 32 for b in batches)


def test_long_texts_and_short_ones_together(tokenizer):
    rows = real_rows(load_calibration([LONG, "the cat"], tokenizer, mode="rows", max_length=32))
    assert sorted(map(len, rows)) == [4, 32]
    whole = max(rows, key=len)
    assert (whole[0], whole[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id), (
        "cutting keeps the special tokens"
    )


def test_long_ids_become_several_rows():
    rows = real_rows(load_calibration([list(range(1, 26))], mode="rows", max_length=10))
    assert sorted(sum(rows, [])) == list(range(1, 26)) and max(map(len, rows)) == 10


@pytest.mark.parametrize("mode", ["pack", "rows"])
def test_no_length_warning(mode, caplog):
    """A fresh tokenizer: transformers gives this warning once per tokenizer."""
    logger = logging.getLogger("transformers")
    before, logger.propagate = logger.propagate, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_calibration([LONG], make_tokenizer(), mode=mode, max_length=128)
            assert "longer than" not in caplog.text
            make_tokenizer()(LONG)
        assert "longer than" in caplog.text, "the warning exists, and would have been seen"
    finally:
        logger.propagate = before


# --- AutoAWQ's defect 9: no mask, short texts glued together ---


def test_rows_are_separate_and_masked(tokenizer):
    texts = ["the cat", "a dog sleeps under the tree", "fire"]
    batches = load_calibration(texts, tokenizer, mode="rows")
    assert real_rows(batches) == sorted(tokenizer(t)["input_ids"] for t in texts)
    for b in batches:
        assert (b.input_ids[b.attention_mask == 0] == tokenizer.pad_token_id).all()
    assert sum(int((b.attention_mask == 0).sum()) for b in batches) > 0


def test_an_encoder_sees_each_text_as_if_alone(tokenizer, bert_dir):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(bert_dir).eval()
    (batch,) = load_calibration(
        ["the cat", "a dog sleeps under the old tree"], tokenizer, mode="rows"
    )
    with torch.no_grad():
        together = model(**batch.model_inputs()).last_hidden_state
        for ids, mask, hidden in zip(batch.input_ids, batch.attention_mask, together):
            alone = model(input_ids=ids[mask.bool()].unsqueeze(0)).last_hidden_state[0]
            torch.testing.assert_close(hidden[mask.bool()], alone, atol=1e-5, rtol=1e-4)


def test_length_order_wastes_little_padding():
    rows = [[4] * n for n in [3, 500, 4, 480, 5, 490] * 20]
    batches = load_calibration(rows, mode="rows")
    assert sum(b.input_ids.numel() for b in batches) < 1.1 * tokens(batches)
    assert (
        all(b.input_ids.numel() <= 4096 for b in batches)
        and sum(len(b.input_ids) for b in batches) == 120
    )


# --- kinds of data ---


def test_pack_makes_full_rows(tokenizer):
    texts = ["the cat runs", "a dog sleeps", "old stone"]
    whole = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts[:2]]
    assert real_rows(load_calibration(texts, tokenizer, max_length=3)) == sorted(whole)
    short = load_calibration(["the cat"], tokenizer, max_length=512)
    assert tokens(short) == 2, "a remainder is kept when there is nothing else"


@pytest.mark.parametrize("mode", ["pack", "rows"])
def test_max_samples_and_determinism(mode, tokenizer, texts):
    first, again = (
        load_calibration(texts, tokenizer, mode=mode, max_samples=7, max_length=8) for _ in range(2)
    )
    assert sum(len(b.input_ids) for b in first) == 7
    assert all(torch.equal(x.input_ids, y.input_ids) for x, y in zip(first, again))


def test_ids_as_lists_tensors_arrays_and_outputs(tokenizer):
    want = [[5, 6], [7, 8, 9]]
    padded, mask = [[5, 6, 0], [7, 8, 9]], [[1, 1, 0], [1, 1, 1]]
    kinds = {
        "lists": want,
        "1-D and [1, n] tensors": [torch.tensor([5, 6]), torch.tensor([[7, 8, 9]])],
        "arrays": [np.array([5, 6]), np.array([7, 8, 9])],
        "dicts": [
            {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]},
            {"input_ids": torch.tensor([[7, 8, 9]])},
        ],
        "one output": {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)},
        "an output without padding": {"input_ids": want, "attention_mask": [[1, 1], [1, 1, 1]]},
    }
    for kind, data in kinds.items():
        assert real_rows(load_calibration(data, mode="rows")) == want, kind
    for kind, data in {"tensor": torch.tensor(padded), "array": np.array(padded)}.items():
        for mode in ("pack", "rows"):
            assert real_rows(load_calibration(data, tokenizer, mode=mode)) == want, (kind, mode)
    texts = ["the cat", "a dog sleeps"]
    output = make_tokenizer("left")(texts, padding=True, return_tensors="pt")
    assert real_rows(load_calibration(output, mode="rows")) == sorted(
        tokenizer(t)["input_ids"] for t in texts
    ), "left padding"


def test_padding_of_a_tensor_is_only_at_its_ends():
    rows = torch.tensor([[0, 5, 0, 6, 0, 0], [7, 7, 7, 7, 7, 7], [0, 0, 0, 0, 0, 0]])
    assert real_rows(load_calibration(rows, mode="rows", pad_id=0)) == [[5, 0, 6], [7] * 6]
    assert tokens(load_calibration(rows, mode="rows")) == 18, (
        "without a padding id every token is real"
    )


def test_packing_reads_no_more_texts_than_it_needs():
    asked = []

    def tokenizer(text, **_):
        asked.append(text)
        return {"input_ids": list(range(10))}

    assert len(tokenize(tokenizer, ["text"] * 100, enough=25)) == len(asked) == 3


# --- files, hub, bundled text ---


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return path


def test_files(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    odd, want = (
        "one\u2028line \u2013 \u201cquoted\u201d",
        ["the cat", "one\u2028line \u2013 \u201cquoted\u201d"],
    )
    pq.write_table(pa.table({"body": ["the cat", None, "", odd]}), tmp_path / "t.parquet")
    raw = [json.dumps({"body": t}, ensure_ascii=False) for t in ["the cat", "", odd]]
    files = [
        tmp_path / "t.parquet",
        write(tmp_path / "t.jsonl", "\n".join(raw) + "\n"),
        write(tmp_path / "t.json", f"[{','.join(raw)}]"),
        write(tmp_path / "t.csv", f"\ufeffbody,n\nthe cat,1\n,2\n{odd},3\n"),
        write(tmp_path / "t.tsv", f"n\tbody\n1\tthe cat\n3\t{odd}\n"),
        write(tmp_path / "t.txt", f"the cat\n\n\n{odd}"),
    ]
    for path in files:
        assert [t.strip() for t in file_texts(path, "body")] == want, path.suffix


def test_csv_with_line_breaks_and_long_fields(tmp_path):
    long = "word " * 40_000
    path = write(tmp_path / "t.csv", f'text,n\n"first\nsecond",1\n"{long}",2\n')
    assert file_texts(path) == ["first\nsecond", long]


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("t.jsonl", '{"text": "a"}\n{"text": ', "cannot be read"),
        ("t.jsonl", '{"body": "a"}', "column 'text'"),
        ("t.csv", "body\na\n", "column 'text'"),
        ("t.parquet", "not parquet", "cannot be read"),
        ("t.txt", " \n\n ", "holds no text"),
        ("t.json", "[1, 2]", "cannot be read"),
    ],
)
def test_bad_files(name, content, match, tmp_path):
    with pytest.raises(CalibrationError, match=match):
        file_texts(write(tmp_path / name, content))


def test_missing_files_are_not_taken_for_datasets(tmp_path):
    for name in (tmp_path / "no.jsonl", tmp_path / "no"):
        with pytest.raises(CalibrationError, match="does not exist"):
            named_samples(str(name), "train", "text", 8)
    with pytest.raises(CalibrationError, match="is a directory"):
        named_samples(str(tmp_path), "train", "text", 8)


def fake_hub(monkeypatch, rows):
    import datasets

    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split))
        if isinstance(rows, Exception):
            raise rows
        return iter(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_dataset_of_the_hub(monkeypatch, caplog):
    asked = fake_hub(
        monkeypatch,
        [{"text": "the cat"}, {"text": None}, {"text": " "}, {"text": "a dog"}, {"text": "late"}],
    )
    assert named_samples("pileval", "train", "text", 4)[0] == ["the cat", "a dog"]
    assert named_samples("some/set", "test", "text", 1)[0] == ["the cat"]
    assert asked == [("mit-han-lab/pile-val-backup", "validation"), ("some/set", "test")]
    with pytest.raises(CalibrationError, match=r"no column 'body', only \['text'\]"):
        named_samples("some/set", "train", "body", 4)
    fake_hub(monkeypatch, [{"text": None}])
    with pytest.raises(CalibrationError, match="holds no text"):
        named_samples("some/set", "train", "text", 4)
    assert not caplog.text


@pytest.mark.parametrize(
    "name, content",
    [
        ("t.jsonl", '{"body": "the cat", "n": 1}\n'),
        ("t.json", '[{"body": "the cat", "n": 1}]'),
        ("t.csv", "body,n\nthe cat,1\n"),
        ("t.tsv", "body\tn\nthe cat\t1\n"),
    ],
)
def test_a_file_without_the_column_says_which_it_has(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=r"no column 'text', only \['body', 'n'\]; give"):
        named_samples(str(tmp_path / name), "train", "text", 4)
    assert named_samples(str(tmp_path / name), "train", "body", 4)[0] == ["the cat"]


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), OSError(), KeyError("inside the hub client")]
)
def test_no_hub_means_bundled_text_with_a_warning(error, monkeypatch, caplog):
    fake_hub(monkeypatch, error)
    samples, _ = named_samples("pileval", "train", "text", 4)
    assert samples is None  # the caller takes the bundled text
    assert "bundled text" in caplog.text and "pile-val-backup" in caplog.text


def test_nothing_given_means_bundled_text_with_a_warning(tokenizer, caplog):
    assert tokens(load_calibration(None, tokenizer)) > 1000
    assert "bundled text" in caplog.text


def test_bundled_text():
    texts = bundled_texts()
    scripts = {
        "Cyrillic": "Ѐӿ",
        "Han": "一鿿",
        "Kana": "ぁヿ",
        "Arabic": "؀ۿ",
        "Hangul": "가힣",
        "Devanagari": "ऀॿ",
    }
    for script, (low, high) in scripts.items():
        assert any(sum(low <= c <= high for c in t) > 40 for t in texts), script
    assert len(texts) == len(set(texts)) > 90
    assert 500_000 < sum(len(t.encode()) for t in texts) < 2_000_000
    assert max(map(len, texts)) < 2500 and not any("\ufffd" in t for t in texts)
    short = bundled_texts(short=True)
    assert (
        len(short) > 5 * len(texts)
        and min(map(len, short)) >= 16
        and sum(len(t) < 200 for t in short) > 0.9 * len(short)
    )


@pytest.mark.parametrize("short", [False, True])
def test_bundled_text_is_as_people_write_it(short):
    """No text of it spells a special token of any tokenizer: no served text would."""
    marks = [
        "<unk>",
        "<s>",
        "</s>",
        "<pad>",
        "<bos>",
        "<eos>",
        "<mask>",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "[PAD]",
        "<|",
    ]
    marks += [" @-@ ", " @,@ ", " @.@ "]
    for text in bundled_texts(short):
        assert not [mark for mark in marks if mark in text], text[:80]


@pytest.mark.parametrize("find", ["minilm_dir", "smollm2_dir"])
def test_no_general_row_holds_a_special_token(find):
    real_models = pytest.importorskip("real_models")
    try:
        folder = getattr(real_models, find)()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(folder)
    own = load_calibration([[5] * 64] * 64, mode="rows")
    rows = real_rows(with_general_rows(own, real, 64)[len(own) :])
    chats = {
        i
        for text in rendered_chats(real)
        for i in real(text, add_special_tokens=False)["input_ids"]
    }
    assert (
        len(rows) == 64 and {i for row in rows for i in row} & set(real.all_special_ids) <= chats
    ), "chats hold them on purpose"
    passages = spelled_texts(bundled_texts(), real)
    ids = {i for text in passages for i in real(text, add_special_tokens=False)["input_ids"]}
    assert len(passages) > 500 and not ids & set(real.all_special_ids)


@pytest.mark.parametrize("own_rows", [2, 16, 32, 48])
def test_general_text_fills_up_what_few_rows_leave(own_rows):
    """Twice the wanted rows in all, at least as many general ones; weights of mean 1."""
    own = load_calibration([[5] * 8] * own_rows, mode="rows")
    joined = with_general_rows(own, make_tokenizer(), 32)
    counts = [len(batch.input_ids) for batch in joined]
    general = sum(counts[len(own) :])
    assert general == max(64 - own_rows, own_rows)
    assert sum(n * b.weight for n, b in zip(counts, joined)) == pytest.approx(sum(counts))
    expected = min(MAX_WEIGHT, (1 - GENERAL_SHARE) * sum(counts) / own_rows)
    assert own_rows == 2 or expected < MAX_WEIGHT
    weight = joined[0].weight
    assert weight == pytest.approx(expected) and joined[-1].weight != weight
    again = rebatched(joined, 64)
    assert {b.weight for b in again} == {b.weight for b in joined}
    rows = real_rows([b for b in again if b.weight == weight])
    assert rows == [[5] * 8] * own_rows, "rows of two weights never share a batch"


def test_chats_come_in_the_models_own_template():
    plain, chatty = make_tokenizer(), make_tokenizer()
    chatty.chat_template = "{% for m in messages %}<<{{ m.role }}>>{{ m.content }}{% endfor %}"
    passages = ["the cat"] * 30
    assert general_texts(plain, passages) == passages
    mixed = general_texts(chatty, passages)
    chats = [chatty.apply_chat_template(chat, tokenize=False) for chat in bundled_chats()]
    assert mixed[:8] == passages[:8] and mixed[8] == chats[0] and mixed[17] == chats[1]
    assert [text for text in mixed if text != "the cat"] == chats
    chatty.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% "
        "endif %}{{ messages[0].content }}"
    )
    assert (
        0
        < len(rendered_chats(chatty))
        == sum(chat[0]["role"] != "system" for chat in bundled_chats())
        < len(chats)
    )


def test_tool_calls_come_where_the_template_knows_them():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if tools %}[tools]{% for t in tools %}{{ t.function.name }};{% endfor %}{% endif %}"
        "{% for m in messages %}[{{ m.role }}]{% for call in m.tool_calls %}"
        "{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}"
        "{{ m.content }}{% endfor %}"
    )
    texts = rendered_chats(tokenizer)
    count = len(bundled_tool_chats())
    assert count and len(texts) == len(bundled_chats()) + count
    for text, chat in zip(texts, bundled_tool_chats()):
        names = [tool["function"]["name"] for tool in chat["tools"]]
        assert text.startswith("[tools]" + "".join(f"{name};" for name in names))
        calls = [c["function"] for m in chat["messages"] for c in m.get("tool_calls", ())]
        assert calls and all(call["name"] in names for call in calls)
        assert all(f"{c['name']} {json.dumps(c['arguments'])[:8]}" in text for c in calls)
        roles = [m["role"] for m in chat["messages"]]
        assert roles.count("tool") == len(calls) and roles[-1] == "assistant"
    assert not any(text.startswith("[tools]") for text in texts[count:])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert len(rendered_chats(tokenizer)) == len(bundled_chats())


def test_texts_that_cannot_be_spelled_are_left_out(tokenizer):
    known, unknown = ["the cat"] * 2, ["zork"] * 3
    assert spelled_texts(known + unknown, tokenizer) == known
    assert spelled_texts(unknown, tokenizer) == unknown, (
        "a tokenizer that is not made for text gets all of it"
    )


# --- prepare_calibration_tokens ---


def test_prepare_calibration_tokens(tokenizer):
    made = prepare_calibration_tokens(
        tokenizer, ["the cat", "", LONG, "a dog sleeps"], max_length=20
    )
    assert [tuple(t.shape) for t in made] == [(1, 4), (1, 20), (1, 5)]
    assert all(t.dtype == torch.int64 for t in made)
    assert real_rows(load_calibration(made, tokenizer, mode="rows")) == sorted(
        t[0].tolist() for t in made
    )
    with pytest.raises(CalibrationError, match="one string"):
        prepare_calibration_tokens(tokenizer, "the cat")


# --- errors ---


@pytest.mark.parametrize(
    "data, options, match",
    [
        ([], {}, "empty"),
        ([[]], {}, "empty"),
        (["", " "], {}, "empty"),
        (torch.zeros(0, 4).long(), {}, "empty"),
        (["the cat", [4, 5]], {}, "mixes"),
        ([[4, -100]], {}, "negative"),
        ([[0.5, 1.0]], {}, "integers"),
        (torch.rand(2, 3), {}, "integers"),
        ([{"ids": [4]}], {}, "no input_ids"),
        (7, {}, "int"),
        ([object()], {}, "not token ids"),
        ([[4, 5]], {"mode": "stack"}, "mode"),
        ([[4, 5]], {"max_samples": 0}, "at least 1"),
        ([[4, 5]], {"max_length": 0}, "at least 1"),
    ],
)
def test_errors(data, options, match, tokenizer):
    with pytest.raises(CalibrationError, match=match):
        load_calibration(data, tokenizer, **options)


def test_texts_need_a_tokenizer():
    with pytest.raises(CalibrationError, match="need a tokenizer"):
        load_calibration(["the cat"])
