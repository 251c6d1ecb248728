"""Quantizing embedding models: texts and prompts, what stays in full precision, padding, judging,
and the readers."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import sentence_transformers as library
import torch
from conftest import make_tokenizer
from real_models import minilm_dir
from rerankers import reranker_directory, word_pairs
from safetensors.torch import load_file
from test_encoder import sentence_directory
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from awq import (
    AutoAWQForCausalLM,
    AutoAWQForEmbedding,
    AwqConfig,
    Encoder,
    clean_texts,
    load_calibration,
    prepare_calibration_tokens,
    quantize_model,
)
from awq.calibration import CalibrationBatch
from awq.calibration.sources import bundled_texts
from awq.checkpoint.files import packed_among, tensor_headers, weight_files
from awq.errors import CalibrationError, ConfigError, ModelError
from awq.evals.similarity import embeddings_of, judge, mean_cosine
from awq.nn.linear import WQLinear
from awq.quantize.match import OutputMatch

CONFIG = {"q_group_size": 16}
PROMPTS = {"prompts": {"query": "the old house ", "passage": "red "}, "default_prompt_name": None}


@pytest.fixture(scope="module")
def sentence_dir(bert_dir, tmp_path_factory):
    return sentence_directory(
        bert_dir,
        tmp_path_factory.mktemp("s") / "m",
        ("cls", "mean"),
        dense=True,
        normalize=True,
        config=PROMPTS,
    )


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """all-MiniLM-L6-v2 at group 128, calibrated on one half of the bundled sentences: (report,
    directory)."""
    sentences = [
        s.strip()
        for t in bundled_texts()
        for s in t.replace("。", ".").split(".")
        if len(s.strip()) >= 20
    ]
    model = AutoAWQForEmbedding.from_pretrained(str(minilm_dir()))
    report = model.quantize(
        texts=sentences,
        quant_config={"q_group_size": 128},
        preset="fast",
        max_calib_samples=128,
        general_texts=False,
    )
    target = tmp_path_factory.mktemp("minilm") / "q"
    model.save_quantized(target)
    return report, target


def test_clean_texts():
    dirty = [
        "a\tb\n c",
        " a b c ",
        "",
        None,
        "\x00x\x07y\u200b",
        "été\u00a0\u3000!",
        "नमस्ते 👩\u200d💻",
        "\ufeff",
        "\ud800z",
    ]
    assert clean_texts(dirty) == ["a b c", "xy", "été !", "नमस्ते 👩\u200d💻", "z"]
    with pytest.raises(CalibrationError, match="one string"):
        clean_texts("abc")
    with pytest.raises(CalibrationError, match="int"):
        clean_texts(["a", 3])


def test_tuning_aims_at_the_embeddings(sentence_dir, texts):
    """Its distance is 1 − cosine through the directory's own pooling, dense head and norm."""
    model = AutoAWQForEmbedding.from_pretrained(str(sentence_dir))
    batches = load_calibration(texts, model.tokenizer, mode="rows")
    match = OutputMatch(model.model, batches, embed=model._embedding())
    before = model.encode(texts)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if name.endswith("dense.weight"):
                parameter += 0.1 * torch.randn_like(parameter)
        found = [match.distance(i) for i in range(len(batches))]
    assert match.kind == "cosine" and sum(rows for _, rows in found) == len(texts)
    moved = 1 - mean_cosine(before, model.encode(texts))
    assert moved > 1e-3
    assert float(sum(total for total, _ in found)) / len(texts) == pytest.approx(moved, rel=0.01)


@pytest.mark.parametrize("door", [AutoAWQForEmbedding, AutoAWQForCausalLM])
def test_best_brings_embeddings_nearer(sentence_dir, door):
    words = ["river", "hill", "tree", "stone", "water", "fire", "house", "road"]
    texts = [f"{a} {b} {c}" for a in words for b in words for c in words]
    model = door.from_pretrained(str(sentence_dir))
    model.quantize(
        texts=texts,
        quant_config=CONFIG,
        preset="best",
        tuning=6,
        general_texts=False,
        evaluate=False,
    )
    tuning = model.report.tuning
    assert tuning["kind"] == "cosine" and tuning["loss_after"] < tuning["loss_before"]


def test_size_decides_the_number_of_texts(bert_dir):
    model = AutoAWQForEmbedding.from_pretrained(str(bert_dir))
    assert model.sample_count() == 256
    for width, count in ((20_000, 1024), (120_000, 2048)):
        model.model.huge = torch.nn.Linear(width, 10_000, device="meta")
        assert model.sample_count() == count


def test_texts_files_pairs_and_prompts_reach_calibration(
    sentence_dir, texts, tmp_path, monkeypatch
):
    """The tokens that calibration sees are those that the model will be asked with."""
    seen = []
    from awq.models import embedding
    from awq.models import model as base

    def recording(data, tokenizer, **kwargs):
        seen.append((list(getattr(data, "samples", data)), kwargs["max_length"], kwargs["mode"]))
        raise CalibrationError("seen")

    monkeypatch.setattr(base, "load_calibration", recording)
    model = AutoAWQForEmbedding.from_pretrained(str(sentence_dir))
    (tmp_path / "t.txt").write_text("the  cat\n\na\x07 dog\n\nthe cat")
    for data, kwargs, expected in (
        (["the cat", " the  cat", "a dog"], {}, ["the cat", "a dog"]),
        (str(tmp_path / "t.txt"), {}, ["the cat", "a dog"]),
        ([("the cat", "a dog"), ("a dog", "fire")], {}, ["the cat", "a dog", "fire"]),
        (["the cat"], {"prompt_name": "passage"}, ["red the cat"]),
        (
            {"query": ["the cat"], "passage": ["fire", "a dog"]},
            {},
            ["the old house the cat", "red fire", "red a dog"],
        ),
    ):
        with pytest.raises(CalibrationError, match="seen"):
            model.quantize(texts=data, quant_config=CONFIG, general_texts=False, **kwargs)
        assert seen.pop() == (expected, 40, "rows"), "max_seq_length of the directory is 40"
    with pytest.raises(CalibrationError, match="seen"):
        model.quantize(
            texts=[f"w{i}" for i in range(30, 60)], quant_config=CONFIG, max_calib_samples=3
        )
    calibration = seen.pop()[0]
    assert calibration[:3] == ["w30", "w40", "w50"], "spread over the texts"
    assert len(calibration) == 3 + embedding.GENERAL_SENTENCES, "and the bundled text"
    assert not {"w31", "w39"} & set(calibration), "but nothing that judges"


def test_bad_input_before_any_weight_is_touched(sentence_dir):
    model = AutoAWQForEmbedding.from_pretrained(str(sentence_dir))
    for kwargs, message in (
        ({"texts": ["  ", "\n"]}, "after cleaning"),
        ({"texts": ["a"], "prompt_name": "no"}, "query, document, passage"),
        ({"texts": {"query": ["a"]}, "prompt_name": "query"}, "by prompt name"),
        ({"texts": ["a"], "evaluate": ["b"]}, "at least 2"),
        ({"texts": ["a"], "speed": 3}, "speed"),
    ):
        with pytest.raises((ConfigError, CalibrationError), match=message):
            model.quantize(quant_config=CONFIG, **kwargs)
    assert not any(isinstance(m, WQLinear) for m in model.model.modules())


def test_report_and_card_tell_before_and_after(sentence_dir, texts, tmp_path):
    model = AutoAWQForEmbedding.from_pretrained(str(sentence_dir))
    before = model.encode(texts[20:])
    report = model.quantize(texts=texts[:20], quant_config=CONFIG, evaluate=texts[20:])
    assert report.evaluation == judge(before, model.encode(texts[20:]))
    assert 0.9 < report.evaluation.mean_cosine < 1 and report.evaluation.texts == len(texts) - 20
    model.save_quantized(tmp_path / "q")
    assert (
        json.loads((tmp_path / "q/quantization_report.json").read_text())["evaluation"]
        == report.evaluation.to_dict()
    )
    assert report.evaluation.summary() in (tmp_path / "q/README.md").read_text()
    pairs = ([4.0, 1.0] * 20, texts[:40], texts[20:])
    fresh = AutoAWQForEmbedding.from_pretrained(str(sentence_dir))
    found = fresh.quantize(texts=texts[:20], quant_config=CONFIG, evaluate=pairs).evaluation
    assert found.texts == 80 and found.spearman_before is not None and found.ndcg_after is not None


def test_texts_left_over_are_judged_on(sentence_dir, texts):
    for kwargs, count in (
        ({"max_calib_samples": 20}, 40),
        ({"max_calib_samples": 45}, None),
        ({}, None),
        ({"max_calib_samples": 20, "evaluate": False}, None),
    ):
        model = AutoAWQForEmbedding.from_pretrained(str(sentence_dir))
        found = model.quantize(texts=texts, quant_config=CONFIG, preset="fast", **kwargs).evaluation
        assert (found and found.texts) == count


def test_a_live_sentence_transformer(sentence_dir, texts, tmp_path):
    live = library.SentenceTransformer(str(sentence_dir), device="cpu")
    before = embeddings_of(live, texts)
    model = AutoAWQForEmbedding.from_sentence_transformer(live)
    model.quantize(texts=texts, quant_config=CONFIG)
    after = embeddings_of(live, texts)
    assert 0.9 < mean_cosine(before, after) < 1, "changed in place"
    torch.testing.assert_close(after, model.encode(texts), atol=1e-5, rtol=1e-4)
    model.save_quantized(tmp_path / "q")
    torch.testing.assert_close(
        after,
        embeddings_of(library.SentenceTransformer(str(tmp_path / "q")), texts),
        atol=1e-5,
        rtol=1e-4,
    )
    with pytest.raises(ModelError, match="transformer"):
        AutoAWQForEmbedding.from_sentence_transformer([torch.nn.Linear(2, 2)])


def test_what_is_not_quantized_is_listed_and_other_files_are_untouched(
    sentence_dir, texts, tmp_path
):
    model = AutoAWQForEmbedding.from_pretrained(str(sentence_dir))
    model.quantize(texts=texts, quant_config=CONFIG)
    model.save_quantized(tmp_path / "q")
    listed = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"][
        "modules_to_not_convert"
    ]
    assert "pooler.dense" in listed and "pooler.dense" not in packed_among(
        tensor_headers(weight_files(tmp_path / "q"))
    )
    same_files(sentence_dir, tmp_path / "q")


def same_files(source, target):
    ours = {"config.json", "model.safetensors", "README.md"}
    for path in (
        p for p in source.rglob("*") if p.is_file() and str(p.relative_to(source)) not in ours
    ):
        assert (target / path.relative_to(source)).read_bytes() == path.read_bytes(), path.name


def test_minilm_files_figures_and_size(minilm):
    report, target = minilm
    same_files(minilm_dir(), target)
    assert report.evaluation.mean_cosine > 0.95 and report.evaluation.neighbour_overlap > 0.7
    tensors = {}
    for file in weight_files(target):
        tensors |= load_file(file)
    size = {name: tensor.nbytes for name, tensor in tensors.items()}
    embeddings = sum(n for name, n in size.items() if "embeddings." in name)
    full = sum(
        p.numel() * 4
        for name, p in AutoModel.from_pretrained(minilm_dir()).named_parameters()
        if "embeddings." not in name
    )
    assert len([n for n in size if n.endswith("qweight")]) == 36
    assert (sum(size.values()) - embeddings) / full <= 0.35


def test_embeddings_in_float16_halve_the_tables(tmp_path, texts):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=2000,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    source = tmp_path / "dense"
    BertModel(config, add_pooling_layer=False).save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    model = AutoAWQForEmbedding.from_pretrained(str(source), torch_dtype="float16")
    settings = {"preset": "fast", "evaluate": False, "general_texts": False}
    model.quantize(texts=texts[:20], quant_config={"q_group_size": 128}, **settings)
    model.save_quantized(tmp_path / "q")
    full = sum(f.stat().st_size for f in weight_files(source))
    small = sum(f.stat().st_size for f in weight_files(tmp_path / "q"))
    tables = sum(p.numel() for n, p in model.model.named_parameters() if "embeddings." in n)
    assert small <= 0.35 * (full - 4 * tables) + 2 * tables
    held_out = texts[20:]
    dense = Encoder.from_pretrained(source, device="cpu").encode(held_out)
    assert mean_cosine(dense, model.encode(held_out).cpu()) > 0.95


def test_every_reader_gives_the_same(minilm):
    _, target = minilm
    texts = ["The river is cold.", "Hills are old, and rivers are older than the hills.", "Yes."]
    encoder = Encoder.from_pretrained(target, device="cpu")
    rows = encoder._tokenize(texts)
    mine = encoder({key: encoder._padded(key, values) for key, values in rows.items()})
    st = embeddings_of(library.SentenceTransformer(str(target), device="cpu"), texts)
    torch.testing.assert_close(mine, st, atol=1e-5, rtol=1e-4)
    # The compiled program rounds activations to 16 bits; its proof allows 1e-3 of an embedding's
    # length.
    compiled = encoder.encode(texts)
    assert (compiled - mine).norm(dim=1).max() < 1e-3
    tokenizer, model = AutoTokenizer.from_pretrained(target), AutoModel.from_pretrained(target)
    for text, row in zip(texts, mine):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        torch.testing.assert_close(
            torch.nn.functional.normalize(hidden, dim=0), row, atol=1e-5, rtol=1e-4
        )


def test_padding_does_not_matter(minilm):
    """The same sentence alone and beside a much longer one, float32."""
    encoder = Encoder.from_pretrained(minilm[1], device="cpu")
    text, long = "The river is cold.", "Hills are old. " * 40
    rows = encoder._tokenize([text, long])
    together = encoder({key: encoder._padded(key, values) for key, values in rows.items()})
    alone = encoder({key: encoder._padded(key, values[:1]) for key, values in rows.items()})
    torch.testing.assert_close(together[0], alone[0], atol=1e-5, rtol=0)
    # The compiled program has no padding: the same bits alone and in company.
    assert torch.equal(encoder.encode([text, long])[0], encoder.encode(text))
    assert len(rows["input_ids"][1]) > 100


def test_same_weights_however_calibration_is_padded(bert_dir, tokenizer, texts):
    """Bit for bit: one text at a time, all in one batch, padded on the left, padded more than
    needed and with a real token."""
    rows = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]

    def batch(rows, length, side, fill):
        out = (
            torch.full((len(rows), length), fill),
            torch.zeros(len(rows), length, dtype=torch.long),
        )
        for i, row in enumerate(rows):
            place = slice(length - len(row), None) if side == "left" else slice(0, len(row))
            out[0][i, place], out[1][i, place] = row, 1
        return CalibrationBatch(*out)

    longest = max(map(len, rows))
    ways = {
        "alone": [batch([row], len(row), "right", 0) for row in rows],
        "together": [batch(rows, longest, "right", 0)],
        "on the left": [batch(rows, longest, "left", 0)],
        "too much": [batch(rows[:7], 64, "right", 17), batch(rows[7:], 60, "right", 17)],
        "as loaded": load_calibration(rows, mode="rows"),
    }
    found = {}
    for name, batches in ways.items():
        model = AutoModel.from_pretrained(bert_dir)
        report = quantize_model(model, batches, AwqConfig(group_size=16))
        found[name] = (
            [(r.kind, r.ratio, r.loss) for r in report.linears],
            report.tokens,
            [m.quantized() for m in model.modules() if isinstance(m, WQLinear)],
        )
    lines, tokens, weights = found["alone"]
    for name, (other_lines, other_tokens, others) in found.items():
        assert other_lines == lines and other_tokens == tokens, name
        for mine, other in zip(weights, others):
            assert all(torch.equal(a, b) for a, b in zip(mine[:3], other[:3])), name


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_padding_leaks_nothing(family, tokenizer, texts):
    """Statistics of one batch of padded rows and of the rows alone are equal up to the order of
    sums: float64 shows it."""
    import zoo

    from awq.quantize.statistics import MaskHolder, collect_inputs

    tiny = zoo.tiny_model(family)
    # eager ones have float32 parts
    model = AutoModel.from_config(tiny.config, attn_implementation="sdpa").double().eval()
    model.load_state_dict(tiny.state_dict())
    linears = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "pooler" not in n
    ]
    (padded,) = load_calibration(tokenizer(texts[:20])["input_ids"], mode="rows", pad_id=0)
    alone = [
        (row[keep].unsqueeze(0), None)
        for row, keep in zip(padded.input_ids, padded.attention_mask.bool())
    ]
    sums = []
    for batches in ([(padded.input_ids, padded.attention_mask)], alone):
        holder = MaskHolder()
        with collect_inputs(model, linears, holder) as statistics, torch.no_grad():
            for ids, mask in batches:
                holder.mask = None if mask is None else mask.bool()
                model(ids, attention_mask=mask if mask is not None else torch.ones_like(ids))
        sums.append(statistics)
    assert not padded.attention_mask.all()
    for name, one in sums[0].items():
        other = sums[1][name]
        assert one.tokens == other.tokens
        # The sums themselves are float32.
        torch.testing.assert_close(
            one.gram, other.gram, rtol=1e-5, atol=2e-6 * float(one.gram.abs().max())
        )


def test_pairs_keep_their_token_types(tmp_path, texts):
    """A cross-encoder is calibrated on what it will see: both texts in one row, the second one of
    type 1."""
    from awq.nn.blocks import find_block_lists
    from awq.nn.recording import record_block_calls

    directory = reranker_directory(tmp_path / "m", steps=0)
    model = AutoAWQForCausalLM.from_pretrained(str(directory))
    pairs = list(zip(texts[:9], texts[30:39]))
    output = model.tokenizer(
        [a for a, _ in pairs], [b for _, b in pairs], padding=True, return_tensors="pt"
    )
    for data in (pairs, output):
        (batch,) = load_calibration(data, model.tokenizer, mode="rows")
        types, want = (
            sorted((row.sum().item(), mask.sum().item()) for row, mask in zip(types, masks))
            for types, masks in (
                (batch.extra["token_type_ids"], batch.attention_mask),
                (output["token_type_ids"], output["attention_mask"]),
            )
        )
        assert types == want and types[0][0] > 0, "tokens of type 1, and all tokens, of each row"
        entering = record_block_calls(
            model.model, find_block_lists(model.model), [batch.model_inputs()]
        ).hidden[0][0]
        with torch.no_grad():
            embedded = model.model.bert.embeddings(
                **{k: v for k, v in batch.model_inputs().items() if k != "attention_mask"}
            )
            untyped = model.model.bert.embeddings(batch.input_ids)
        assert torch.equal(entering, embedded) and not torch.allclose(entering, untyped)
        match = OutputMatch(model.model, [batch])
        with torch.no_grad():
            hidden = model.model.bert(**batch.model_inputs()).last_hidden_state
        mask = batch.attention_mask.bool()
        torch.testing.assert_close(
            torch.cat(match.targets)[mask], hidden[mask], atol=1e-6, rtol=1e-5
        )


def test_token_types_that_the_model_does_not_take(tmp_path, tokenizer, texts):
    import zoo

    zoo.tiny_model("distilbert").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = AutoAWQForCausalLM.from_pretrained(str(tmp_path))
    output = tokenizer(texts, padding=True, return_tensors="pt")
    output["token_type_ids"] = output["attention_mask"].clone()
    assert len(model.quantize(output, quant_config=CONFIG, preset="fast").linears) == 18


def test_guides_tokens_and_bundled_text_still_do(bert_dir, texts):
    for first in (lambda m: prepare_calibration_tokens(m.tokenizer, texts), lambda m: m.tokenizer):
        model = AutoAWQForEmbedding.from_pretrained(str(bert_dir))
        assert len(model.quantize(first(model), quant_config=CONFIG, preset="fast").linears) == 18


def test_reranker_round_trip(tmp_path):
    """A trained cross-encoder: its scores before and after, and every reader's, on pairs that it
    never saw."""
    directory = reranker_directory(tmp_path / "m")
    first, second, shares = word_pairs(300, seed=2)
    pairs = list(zip(first, second))
    before = library.CrossEncoder(str(directory), device="cpu").predict(pairs)
    assert torch.corrcoef(torch.stack([torch.from_numpy(before), shares]))[0, 1] > 0.75, (
        "it has learnt something"
    )
    model = AutoAWQForCausalLM.from_pretrained(str(directory))
    model.quantize(
        model.tokenizer,
        quant_config={"q_group_size": 32},
        calib_data=list(zip(*word_pairs(256, seed=3)[:2])),
    )
    model.save_quantized(tmp_path / "q")
    listed = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"][
        "modules_to_not_convert"
    ]
    assert {"classifier", "bert.pooler.dense", "pooler.dense"} <= set(listed)
    loaded = library.CrossEncoder(str(tmp_path / "q"), device="cpu")
    assert sum(isinstance(m, WQLinear) for m in loaded.model.modules()) == 12
    after = loaded.predict(pairs)
    scores = torch.stack([torch.from_numpy(before), torch.from_numpy(after)])
    assert torch.corrcoef(scores)[0, 1] > 0.99
    direct = scores_of(
        model.model, model.tokenizer(first, second, padding=True, return_tensors="pt")
    )
    torch.testing.assert_close(torch.from_numpy(after), direct, atol=1e-4, rtol=1e-4)


def test_reranker_saved_by_sentence_transformers_keeps_its_head(tmp_path):
    """Recent releases write a modules.json for rerankers too."""
    first, second, _ = word_pairs(40, seed=4)
    pairs = list(zip(first, second))
    library.CrossEncoder(
        str(reranker_directory(tmp_path / "m", steps=0)), device="cpu"
    ).save_pretrained(str(tmp_path / "s"))
    before = library.CrossEncoder(str(tmp_path / "s"), device="cpu").predict(pairs)
    model = AutoAWQForCausalLM.from_pretrained(str(tmp_path / "s"))
    assert type(model.model).__name__ == "BertForSequenceClassification"
    model.quantize(pairs, quant_config={"q_group_size": 32})
    model.save_quantized(tmp_path / "q")
    after = library.CrossEncoder(str(tmp_path / "q"), device="cpu").predict(pairs)
    torch.testing.assert_close(torch.from_numpy(after), torch.from_numpy(before), atol=0.1, rtol=0)


def scores_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits.sigmoid()[:, 0]


# as Qwen3-Embedding: causal, last token, padding on the left; as EmbeddingGemma: both directions,
# mean, prompts
DECODERS = {
    "qwen3": (
        {},
        dict(modes=("lasttoken",), config={"prompts": {"query": "the old house "}}),
        "left",
    ),
    "gemma3_text": (
        {"use_bidirectional_attention": True},
        dict(modes=("mean",), dense=True, config=PROMPTS),
        "right",
    ),
}


@pytest.mark.parametrize("family", DECODERS)
def test_decoder_embedders(family, texts, tmp_path):
    """From a directory to the readers of the quantized one: Encoder, SentenceTransformer (pads as
    the tokenizer says), guide."""
    import zoo
    from conftest import make_tokenizer

    settings, layout, side = DECODERS[family]
    if not zoo.available(family):
        pytest.skip(f"transformers has no {family}")
    tiny = zoo.build(family, {**zoo.DECODERS[family], **settings})
    if any(not hasattr(type(tiny.config)(), key) for key in settings):
        pytest.skip(f"this transformers' {family} looks one way only")
    tiny.model.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain/config.json").read_text())
    # embedders on the hub name a language model there
    config["architectures"] = [type(tiny).__name__]
    (tmp_path / "plain/config.json").write_text(json.dumps(config))
    make_tokenizer(side).save_pretrained(tmp_path / "plain")
    directory = sentence_directory(tmp_path / "plain", tmp_path / "m", normalize=True, **layout)
    model = AutoAWQForEmbedding.from_pretrained(str(directory))
    assert model.tokenizer.padding_side == side
    if settings:
        ids = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 9]])
        first, second = (zoo.outputs(model.model, input_ids=i)[0, 0] for i in ids)
        assert not torch.allclose(first, second, atol=1e-4), "the first token sees the last one"
    before = model.encode(texts[40:], prompt_name="query")
    report = model.quantize(
        texts={"query": texts[:20], "document": texts[20:40]}, quant_config=CONFIG
    )
    assert len(report.linears) == 21 and not report.warnings
    model.save_quantized(tmp_path / "q")
    same_files(directory, tmp_path / "q")
    after = Encoder.from_pretrained(tmp_path / "q").encode(texts[40:], prompt_name="query")
    assert mean_cosine(before, after) > 0.9
    reader = library.SentenceTransformer(str(tmp_path / "q"), device="cpu")
    torch.testing.assert_close(
        after, embeddings_of(reader, texts[40:], prompt_name="query"), atol=1e-5, rtol=1e-4
    )
    guide = AutoAWQForCausalLM.from_pretrained(str(directory))
    guide.quantize(
        prepare_calibration_tokens(guide.tokenizer, texts[:40]), quant_config=CONFIG, preset="fast"
    )
    assert not guide.can_generate() or guide.model.get_output_embeddings() is None
    assert {m.name for m in guide.report.linears} == {m.name for m in report.linears}


def test_code_blocks_of_our_page(sentence_dir, texts, tmp_path, monkeypatch, tokenizer):
    """Blocks run in order and share their names; the server answers what the encoder gives."""
    import base64
    import re
    from pathlib import Path

    root = Path(__file__).parent.parent
    page = (
        (root / "docs/embeddings.md")
        .read_text(encoding="utf-8")
        .replace('"q_group_size": 128', '"q_group_size": 16')
    )
    *blocks, server = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert (root / "examples/embedding_server.py").read_text(encoding="utf-8").endswith(server)
    space = {
        "encoder_path": str(sentence_dir),
        "encoder_quant_path": str(tmp_path / "q"),
        "texts": texts,
    }
    for block in blocks:
        exec(compile(block, "docs/embeddings.md", "exec"), space)
    assert space["vectors"].shape == (len(texts), 8) and space["loader"].validate_model()
    pytest.importorskip("httpx", reason="httpx is not installed")
    testing = pytest.importorskip("fastapi.testclient", reason="fastapi is not installed")
    monkeypatch.setenv("MODEL", str(tmp_path / "q"))
    monkeypatch.setenv("AWQ_CACHE", str(tmp_path / "cache"))
    space = {"__name__": "server"}
    exec(compile(server, "server", "exec"), space)
    client = testing.TestClient(space["app"], raise_server_exceptions=False)
    encoder = Encoder.from_pretrained(tmp_path / "q", device="cpu")

    def ask(status=200, **body):
        answer = client.post("/v1/embeddings", json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    answer = ask(input=texts[:2], model="any", user="somebody")
    found = torch.tensor([row["embedding"] for row in answer["data"]])
    expected = encoder.encode(texts[:2], normalize=True)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    ids = encoder.tokenizer(texts[:2])["input_ids"]
    tokens = sum(map(len, ids))
    assert (
        answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
        and answer["model"] == "q"
    )
    assert client.get("/v1/models").json()["data"][0]["id"] == "q"
    for given in (texts[0], ids[0], ids[:1]):
        row = torch.tensor(ask(input=given)["data"][0]["embedding"])
        torch.testing.assert_close(row, expected[0], atol=1e-6, rtol=1e-5)
    short = torch.tensor(ask(input=texts[0], dimensions=4)["data"][0]["embedding"])
    torch.testing.assert_close(
        short, encoder.encode(texts[0], normalize=True, truncate_dim=4), atol=1e-6, rtol=1e-5
    )
    coded = base64.b64decode(ask(input=texts[0], encoding_format="base64")["data"][0]["embedding"])
    torch.testing.assert_close(
        torch.frombuffer(bytearray(coded), dtype=torch.float32), expected[0], atol=1e-6, rtol=1e-5
    )
    wrong_sizes = [{"input": "a", "dimensions": size} for size in (0, 9)]
    wrong_kinds = [{"input": 3}, {"input": "a", "encoding_format": "hex"}, {}]
    empty = [{"input": []}, {"input": ""}, {"input": ["a", ""]}]
    for bad in (*empty, {"input": [1 << 30]}, *wrong_sizes, *wrong_kinds):
        error = ask(400, **bad)["error"]
        assert error["message"] and error["type"] == "invalid_request_error"
    with ThreadPoolExecutor(8) as pool:  # requests that share calls get what they get alone
        rows = pool.map(lambda text: ask(input=text)["data"][0]["embedding"], texts * 2)
    expected = encoder.encode(texts * 2, normalize=True)
    torch.testing.assert_close(torch.tensor(list(rows)), expected, atol=1e-6, rtol=1e-5)
