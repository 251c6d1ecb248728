"""`Encoder` against sentence-transformers on the same weights, and its own rules."""

import copy
import json
import shutil
from contextlib import nullcontext

import pytest
import sentence_transformers
import torch
import zoo
from torch import nn

from awq import AwqConfig, Encoder, quantize_model
from awq.calibration import load_calibration
from awq.embed import graphs
from awq.embed.batching import batches_by_length
from awq.embed.heads import Dense, Pooling
from awq.errors import AwqError, CheckpointError, ConfigError, ModelError

WORDS = [
    "the cat",
    "a dog sleeps under the old tree",
    "fire",
    "",
    "the quick cat runs over the river " * 12,
]
FLAGS = {
    "cls": "cls_token",
    "max": "max_tokens",
    "mean": "mean_tokens",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens",
    "lasttoken": "lasttoken",
}


def sentence_directory(
    source,
    target,
    modes=("mean",),
    dense=False,
    normalize=False,
    max_length=40,
    config=None,
    **pooling,
):
    """A sentence-transformers directory around a transformers one, in the spelling that all
    releases read."""
    shutil.copytree(source, target)
    width = json.loads((target / "config.json").read_text())["hidden_size"]
    kinds = ["Transformer", "Pooling"] + ["Dense"] * dense + ["Normalize"] * normalize
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{k}" if i else "",
            "type": f"sentence_transformers.models.{k}",
        }
        for i, k in enumerate(kinds)
    ]
    for module in modules[1:]:
        (target / module["path"]).mkdir()
    flags = {f"pooling_mode_{FLAGS[mode]}": mode in modes for mode in FLAGS}
    (target / "1_Pooling/config.json").write_text(
        json.dumps({"word_embedding_dimension": width, **flags, **pooling})
    )
    if dense:
        from safetensors.torch import save_file

        torch.manual_seed(3)
        linear = nn.Linear(width * len(modes), 8)
        save_file(
            {f"linear.{k}": v for k, v in linear.state_dict().items()},
            target / "2_Dense/model.safetensors",
        )
        settings = {
            "in_features": width * len(modes),
            "out_features": 8,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }
        (target / "2_Dense/config.json").write_text(json.dumps(settings))
    (target / "modules.json").write_text(json.dumps(modules))
    (target / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": max_length, "do_lower_case": False})
    )
    (target / "config_sentence_transformers.json").write_text(json.dumps(config or {}))
    return target


def theirs(directory, texts, truncate_dim=None, **kwargs):
    model = sentence_transformers.SentenceTransformer(
        str(directory), device="cpu", truncate_dim=truncate_dim
    )
    return torch.from_numpy(model.encode(texts, **kwargs))


@pytest.mark.parametrize("modes", [(m,) for m in FLAGS] + [("cls", "mean")])
def test_every_pooling_is_sentence_transformers(bert_dir, tmp_path, modes):
    directory = sentence_directory(bert_dir, tmp_path / "m", modes)
    mine = Encoder.from_pretrained(directory, device="cpu").encode(WORDS, batch_size=3)
    assert mine.dtype == torch.float32 and mine.shape == (5, 32 * len(modes))
    torch.testing.assert_close(mine, theirs(directory, WORDS), atol=1e-5, rtol=1e-5)


def test_heads_prompts_and_truncation_are_sentence_transformers(bert_dir, tmp_path):
    config = {
        "prompts": {"query": "the old house ", "passage": "a "},
        "default_prompt_name": "passage",
    }
    directory = sentence_directory(
        bert_dir, tmp_path / "m", ("cls", "mean"), True, True, config=config
    )
    mine = Encoder.from_pretrained(directory, device="cpu")
    for ours, kwargs in (
        ({}, {}),
        ({"prompt_name": "query"},) * 2,
        ({"prompt": "red "},) * 2,
        ({"truncate_dim": 5},) * 2,
        ({"truncate_dim": 5, "normalize": True}, {"truncate_dim": 5, "normalize_embeddings": True}),
    ):
        torch.testing.assert_close(
            mine.encode(WORDS, **ours), theirs(directory, WORDS, **kwargs), atol=1e-5, rtol=1e-5
        )
    assert not torch.allclose(mine.encode(WORDS, prompt_name="query"), mine.encode(WORDS))
    with pytest.raises(ConfigError, match="query, document, passage"):
        mine.encode("fire", prompt_name="question")


def test_the_directory_says_how_many_features_are_kept(bert_dir, tmp_path):
    directory = sentence_directory(bert_dir, tmp_path / "m", config={"truncate_dim": 5})
    mine = Encoder.from_pretrained(directory, device="cpu")
    whole = mine.encode(WORDS, truncate_dim=32)
    assert whole.shape == (5, 32) and torch.equal(mine.encode(WORDS), whole[:, :5])
    assert torch.equal(mine.encode(WORDS, truncate_dim=9), whole[:, :9])
    for value in (0, "5", True):
        edit_json(directory / "config_sentence_transformers.json", truncate_dim=value)
        with pytest.raises(CheckpointError, match="truncate_dim is"):
            Encoder.from_pretrained(directory, device="cpu")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "name",
    [
        "transformer.Transformer",
        "loss.CrossEntropyLoss",
        "activation.Softmax2d",
        "activation.PReLU",
        "container.ModuleList",
        "batchnorm.BatchNorm1d",
    ],
)
def test_activations_that_are_none(bert_dir, tmp_path, name):
    """Found when the head is read, not at the first text."""
    directory = sentence_directory(bert_dir, tmp_path / "m", dense=True)
    activation = f"torch.nn.modules.{name}"
    edit_json(directory / "2_Dense/config.json", activation_function=activation)
    with pytest.raises(CheckpointError, match="activation_function"):
        Encoder.from_pretrained(directory, device="cpu")


def test_heads_that_do_not_belong_together(bert_dir, tmp_path):
    directory = sentence_directory(bert_dir, tmp_path / "m", dense=True)
    edit_json(directory / "1_Pooling/config.json", pooling_mode_cls_token=True)
    with pytest.raises(CheckpointError, match="takes 32 features.*gives 64"):
        Encoder.from_pretrained(directory, device="cpu").encode(WORDS)


@pytest.mark.parametrize("place, kind", [(0, "custom_st.Transformer"), (1, "os.Pooling")])
def test_modules_of_other_peoples_code_are_not_taken_for_known_ones(
    bert_dir, tmp_path, place, kind
):
    directory = sentence_directory(bert_dir, tmp_path / "m")
    modules = json.loads((directory / "modules.json").read_text())
    modules[place]["type"] = kind
    (directory / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match=f"module of kind {kind}"):
        Encoder.from_pretrained(directory, device="cpu")


def test_heads_that_write_elsewhere(bert_dir, tmp_path):
    directory = sentence_directory(bert_dir, tmp_path / "m", dense=True)
    edit_json(directory / "2_Dense/config.json", module_output_name="another_embedding")
    with pytest.raises(ModelError, match="sentence-transformers only"):
        Encoder.from_pretrained(directory, device="cpu")


def test_prompts_that_are_not_pooled(bert_dir, tmp_path):
    directory = sentence_directory(bert_dir, tmp_path / "m", include_prompt=False)
    mine = Encoder.from_pretrained(directory, device="cpu").encode(WORDS, prompt="the old house ")
    torch.testing.assert_close(
        mine, theirs(directory, WORDS, prompt="the old house "), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "family", ["roberta", "mpnet", "distilbert", "modernbert", "nomic_bert", "qwen3", "llama"]
)
def test_families(family, tokenizer, tmp_path):
    if not zoo.available(family):
        pytest.skip(f"transformers has no {family}")
    model = zoo.tiny_model(family)
    getattr(model, "model", model).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    # older releases of sentence-transformers pass on whatever a tokenizer gives
    path = tmp_path / "plain/tokenizer_config.json"
    path.write_text(
        json.dumps(
            json.loads(path.read_text()) | {"model_input_names": ["input_ids", "attention_mask"]}
        )
    )
    config = json.loads((tmp_path / "plain/config.json").read_text())
    (tmp_path / "plain/config.json").write_text(json.dumps({"hidden_size": 32, **config}))
    directory = sentence_directory(
        tmp_path / "plain", tmp_path / "m", ("lasttoken",) if family in zoo.DECODERS else ("mean",)
    )
    encoder = Encoder.from_pretrained(directory, device="cpu")
    mine = encoder.encode(WORDS[:3], batch_size=3)
    torch.testing.assert_close(mine, theirs(directory, WORDS[:3]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine, encoder.encode(WORDS[:3], batch_size=1), atol=1e-5, rtol=1e-5)


class _Stub:
    """A captured graph's stand-in where there is no GPU: it keeps its inputs' shape and runs the
    forward anew."""

    pool = None

    def __init__(self, encoder, inputs, prompt_tokens, stream, pool):
        self.encoder, self.prompt_tokens, self.shape = (
            encoder,
            prompt_tokens,
            inputs["input_ids"].shape,
        )

    def __call__(self, inputs):
        assert inputs["input_ids"].shape == self.shape
        return self.encoder(inputs, self.prompt_tokens)


class _Wrong(_Stub):
    def __call__(self, inputs):
        return super().__call__(inputs) * 1.1


class _Maskless(_Stub):
    """As if the forward had asked on its way whether the mask hides anything, where it did not."""

    def __call__(self, inputs):
        return super().__call__(
            inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}
        )


@pytest.fixture
def on_a_gpu(bert_dir, tmp_path, monkeypatch):
    """An encoder that goes through graphs, stand-ins of them."""
    monkeypatch.setattr(graphs, "Graph", _Stub)
    encoder = Encoder.from_pretrained(
        sentence_directory(bert_dir, tmp_path / "m", max_length=40), device="cpu"
    )

    def encode(texts, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "device", lambda device: nullcontext())
            patch.setattr(torch.cuda, "Stream", lambda device: device)
            patch.setattr(Encoder, "_on_gpu", True)
            return encoder.encode(texts, **settings)

    return encoder, encode


def test_batches_of_few_tokens_go_through_graphs(on_a_gpu):
    encoder, encode = on_a_gpu
    texts = [WORDS[i % 5] + " tree" * (i % 9) for i in range(13)]
    expected = encoder.encode(texts, batch_size=3)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(encode(texts, batch_size=3), expected, atol=1e-5, rtol=1e-5)
    made = encoder._graphs.graphs
    assert (
        made and {key[0] for key in made} <= {1, 2, 4} and {key[1] for key in made} <= {16, 32, 40}
    )
    copied = copy.deepcopy(encoder)
    assert copied._graphs.encoder is copied and not copied._graphs.graphs


def test_graphs_end_with_the_weights_they_were_made_of(on_a_gpu):
    encoder, encode = on_a_gpu
    for _ in range(2):
        encode(WORDS)
    assert encoder._graphs.graphs
    encoder.model.encoder.layer[0].output.dense = nn.Linear(48, 32)
    torch.testing.assert_close(encode(WORDS), encoder.encode(WORDS), atol=1e-5, rtol=1e-5)
    assert not encoder._graphs.graphs
    encode(WORDS)
    assert encoder._graphs.graphs
    encoder.double()
    encode(WORDS)
    assert not encoder._graphs.graphs


@pytest.mark.parametrize("stub", [_Wrong, _Maskless])
def test_a_graph_that_is_wrong_is_not_used(on_a_gpu, stub, monkeypatch, caplog):
    encoder, encode = on_a_gpu
    monkeypatch.setattr(graphs, "Graph", stub)
    texts = ["the cat " * 7, "a dog " * 7]  # 16 tokens each: nothing is padded
    assert [len(ids) for ids in encoder._tokenize(texts)["input_ids"]] == [16, 16]
    for _ in range(3):
        torch.testing.assert_close(encode(texts), encoder.encode(texts), atol=1e-5, rtol=1e-5)
    assert "results differ by" in caplog.text and not encoder._graphs.graphs


def test_batches_that_keep_a_gpu_busy_need_no_graph(on_a_gpu, monkeypatch):
    encoder, encode = on_a_gpu
    weights = sum(m.weight.numel() for m in encoder.modules() if isinstance(m, nn.Linear))
    monkeypatch.setattr(graphs, "_WORK", 48 * weights)
    for _ in range(3):
        encode(WORDS, batch_size=1)
        encode(WORDS[:4], batch_size=4)
    made = {key[:2] for key in encoder._graphs.graphs}
    assert {(1, 16), (1, 40)} <= made and max(rows * length for rows, length in made) <= 48


def test_copies_from_the_cpu_are_made_once():
    def forward():
        table = torch.arange(4).to("meta")
        return table, torch.ones(2).to(torch.float64)

    mode = graphs._ByShapeAlone()
    with mode:
        first = forward()
    with mode.again():
        second = forward()
    with mode.again():
        third = forward()
    assert all(a is b is c for a, b, c in zip(first, second, third)) and first[0].is_meta


@pytest.mark.gpu
@pytest.mark.parametrize(
    "family", ["bert", "roberta", "mpnet", "distilbert", "modernbert", "nomic_bert", "qwen3"]
)
def test_graphs_on_a_gpu(family, tokenizer, tmp_path):
    if not zoo.available(family):
        pytest.skip(f"transformers has no {family}")
    model = zoo.tiny_model(family)
    model = getattr(model, "model", model)
    if family == "bert":
        quantize_model(
            model,
            load_calibration(WORDS, tokenizer, mode="rows", max_length=40),
            AwqConfig(group_size=16),
        )
    pooling = Pooling(("lasttoken",) if family in zoo.DECODERS else ("mean",))
    texts = [WORDS[i % 5] + " tree" * (i % 9) for i in range(1, 30)]
    encoder = Encoder(model.cpu().eval(), tokenizer, [pooling])
    encoder.max_seq_length = 40
    expected = encoder.encode(texts, batch_size=4)
    encoder.cuda()
    for _ in range(3):
        torch.testing.assert_close(
            encoder.encode(texts, batch_size=4), expected, atol=1e-4, rtol=1e-3
        )
    assert encoder._graphs.graphs, encoder._graphs.reason


def test_a_real_model():
    from real_models import minilm_dir

    texts = [f"Sentence {i} tells of {'rivers and ' * (i % 40)}hills." for i in range(60)]
    mine = Encoder.from_pretrained(minilm_dir(), device="cpu").encode(texts)
    torch.testing.assert_close(mine, theirs(minilm_dir(), texts), atol=1e-5, rtol=1e-4)


def test_plain_directory_says_how_it_pools(bert_dir, caplog):
    from transformers import AutoModel, AutoTokenizer

    encoder = Encoder.from_pretrained(bert_dir, device="cpu")
    assert "mean pooling" in caplog.text and "modules.json" in caplog.text
    inputs = AutoTokenizer.from_pretrained(bert_dir)("the old cat", return_tensors="pt")
    hidden = zoo.outputs(AutoModel.from_pretrained(bert_dir), **inputs)
    one = encoder.encode("the old cat")
    assert one.shape == (32,)
    torch.testing.assert_close(one, hidden[0].mean(0), atol=1e-5, rtol=1e-5)
    assert encoder.max_seq_length == 64


def test_a_token_for_padding_that_the_table_lacks(bert_dir, tmp_path):
    """Masks hide what fills a row."""
    shutil.copytree(bert_dir, tmp_path / "m")
    path = tmp_path / "m" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<added>"}))
    encoder = Encoder.from_pretrained(tmp_path / "m", device="cpu")
    assert encoder.tokenizer.pad_token_id >= encoder.model.get_input_embeddings().num_embeddings

    texts = ["the cat", "a dog sleeps under the old tree"]
    alone = torch.cat([encoder.encode([text]) for text in texts])
    torch.testing.assert_close(encoder.encode(texts), alone, atol=1e-5, rtol=1e-4)


def test_right_padding_and_order(bert_dir):
    encoder = Encoder.from_pretrained(bert_dir, device="cpu")
    all_at_once = encoder.encode(WORDS, batch_size=5)
    for text, row in zip(WORDS, all_at_once):
        torch.testing.assert_close(encoder.encode(text), row, atol=1e-5, rtol=1e-5)


def test_the_longest_text_can_be_set_afterwards(bert_dir):
    """As sentence-transformers allows it."""
    encoder = Encoder.from_pretrained(bert_dir, device="cpu")
    whole, long = encoder.encode(["the cat"]), "the cat " * 20
    encoder.max_seq_length = 4
    assert len(encoder._tokenize([long])["input_ids"][0]) == 4
    torch.testing.assert_close(encoder.encode([long]), whole)


def test_buckets():
    lengths = [3, 50, 4, 48, 3, 5, 49, 2]
    for size in (1, 2, 3, 8, 100):
        parts = list(batches_by_length(lengths, size))
        assert (
            sorted(i for p in parts for i in p) == list(range(8)) and max(map(len, parts)) <= size
        )
    assert [[lengths[i] for i in p] for p in batches_by_length(lengths, 8)] == [
        [50, 49, 48],
        [5, 4],
        [3, 3],
        [2],
    ]


def test_bad_input(bert_dir, tmp_path):
    encoder = Encoder.from_pretrained(bert_dir, device="cpu")
    for texts, kwargs, message in (
        ([], {}, "no texts"),
        (["a", 3], {}, "int"),
        (["a"], {"batch_size": 0}, "batch_size"),
        (["a"], {"truncate_dim": 0}, "truncate_dim"),
    ):
        with pytest.raises(ConfigError, match=message):
            encoder.encode(texts, **kwargs)
    with pytest.raises(AwqError, match="nothing"):
        Encoder.from_pretrained(str(tmp_path / "nothing"))
    directory = sentence_directory(bert_dir, tmp_path / "m", dense=True)
    (directory / "2_Dense/model.safetensors").unlink()
    with pytest.raises(AwqError, match="safetensors"):
        Encoder.from_pretrained(directory)
    (directory / "modules.json").write_text(
        (directory / "modules.json").read_text().replace("models.Dense", "models.LSTM")
    )
    with pytest.raises(ModelError, match="SentenceTransformer"):
        Encoder.from_pretrained(directory)
    (directory / "modules.json").write_text("{")
    with pytest.raises(AwqError, match="modules.json"):
        Encoder.from_pretrained(directory)
    with pytest.raises(ModelError, match="pooling mode"):
        Pooling(("median",))
    with pytest.raises(ModelError, match="must be a pooling"):
        Encoder(encoder.model, encoder.tokenizer, [Dense(nn.Linear(2, 2), nn.Tanh())])


def test_only_a_quantized_model_that_torch_runs_is_worth_a_warning(bert_dir, caplog):
    """A model in full precision is where it belongs; a quantized one loses its speed."""
    from test_saving import packed_model

    tokenizer = Encoder.from_pretrained(bert_dir, device="cpu").tokenizer
    packed = packed_model("bert", hidden_size=64, intermediate_size=128)
    for model, told in ((zoo.tiny_model("bert"), False), (packed, True)):
        caplog.clear()
        encoder = Encoder(model.eval(), tokenizer, [Pooling(("weightedmean",))])
        assert not encoder.compiled
        assert ("torch runs it" in caplog.text) == told
