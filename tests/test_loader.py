"""Contract of the embedding provider's loader, with our own base class and with a stand-in for the
host package."""

import copy
import importlib
import inspect
import pickle
import sys
import textwrap
from abc import ABC

import pytest
import torch
from conftest import make_tokenizer
from test_compiled_encoder import SIZES
from zoo import build

from awq import AutoAWQForEmbedding
from awq.errors import AwqError, ConfigError
from awq.nn.linear import WQLinear

HOST = '''
from abc import ABC, abstractmethod
import torch

class BaseModelLoader(ABC):
    """The interface of the host: ours must not lean on anything else of it."""

    def __init__(self, model_name, model_path=None, {older}trust_remote_code=False, **kwargs):
        self.model_name, self.model_path = model_name, model_path
        self.trust_remote_code = trust_remote_code
        self.host_options, self.cleaned = kwargs, 0

    @abstractmethod
    def load_model(self): ...
    @abstractmethod
    def is_model_available(self): ...
    @abstractmethod
    def get_model_info(self): ...

    def get_device(self, device=None):
        raise AssertionError("the loader answers this itself")

    validate_model = get_model_size = get_device

    def cleanup(self):
        self.cleaned += 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.cleanup()
'''


@pytest.fixture(scope="module")
def quantized(bert_dir, texts, tmp_path_factory):
    model = AutoAWQForEmbedding.from_pretrained(str(bert_dir))
    model.quantize(texts, quant_config={"q_group_size": 16})
    target = tmp_path_factory.mktemp("loader") / "bert-awq"
    model.save_quantized(target)
    return str(target)


@pytest.fixture(params=["absent", "host", "older host"])
def loader_class(request, tmp_path, monkeypatch):
    """AutoAWQLoader as it is imported beside each kind of host."""
    for name in [n for n in sys.modules if n.split(".")[0] == "emb_model_provider"]:
        monkeypatch.delitem(sys.modules, name)
    if request.param != "absent":
        package = tmp_path / "emb_model_provider" / "loaders"
        package.mkdir(parents=True)
        (package.parent / "__init__.py").touch()
        (package / "__init__.py").touch()
        older = "cache_dir=None, " if request.param == "older host" else ""
        (package / "base_loader.py").write_text(textwrap.dedent(HOST.format(older=older)))
        monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "awq.integrations.emb_model_provider", raising=False)
    found = importlib.import_module("awq.integrations.emb_model_provider").AutoAWQLoader
    base = found.__mro__[1]
    assert base.__module__.split(".")[0] == (
        "awq" if request.param == "absent" else "emb_model_provider"
    )
    assert base.__abstractmethods__ == {
        "load_model",
        "is_model_available",
        "get_model_info",
    } and issubclass(base, ABC)
    yield found
    for name in [
        n for n in sys.modules if n.startswith(("emb_model_provider", "awq.integrations.emb_model"))
    ]:
        monkeypatch.delitem(sys.modules, name)


def test_signature(loader_class):
    assert not inspect.isabstract(loader_class)
    names = list(inspect.signature(loader_class.__init__).parameters)
    assert names[1:4] == ["model_name", "model_path", "trust_remote_code"] and names[-1] == "kwargs"


def test_life_of_a_model(loader_class, quantized, bert_dir):
    loader = loader_class("some/name", model_path=quantized, cache_dir=None)
    assert loader.is_model_available() and loader.get_model_size() == 0
    info = loader.get_model_info()
    assert info["loaded"] is False and info["parameters"] is None
    model, tokenizer = loader.load_model()
    assert loader.load_model() == (model, tokenizer)
    assert sum(isinstance(m, WQLinear) for m in model.modules()) == 18 and not model.training
    info = loader.get_model_info()
    assert info.pop("parameters") == loader.get_model_size()
    assert info == {
        "model_name": "some/name",
        "model_path": quantized,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "loaded": True,
        "loader": "AutoAWQLoader",
        "source": "local",
        "max_context_length": 64,
        "embedding_dimension": 32,
        "vocab_size": 64,
        "model_type": "bert",
    }
    dense = AutoAWQForEmbedding.from_pretrained(str(bert_dir))
    assert loader.get_model_size() == sum(p.numel() for p in dense.parameters())
    assert loader.validate_model() is True
    loader.cleanup()
    assert loader.get_model_size() == 0 and loader.get_model_info()["loaded"] is False
    assert loader.validate_model() is True, "it loads again"


def test_context_manager_frees_also_after_an_error(loader_class, quantized):
    with pytest.raises(KeyError), loader_class(quantized) as loader:
        loader.load_model()
        raise KeyError
    assert loader.get_model_size() == 0


def test_the_services_own_pooling(loader_class, quantized):
    """What the host does with a pair: one padded batch, mean pooling with the mask, L2 norm."""
    model, tokenizer = loader_class(quantized, device="cpu").load_model()
    encoding = tokenizer(
        ["the cat", "a dog sleeps under the old tree"], padding=True, return_tensors="pt"
    )
    alone = tokenizer(["the cat"], return_tensors="pt")
    with torch.no_grad():
        batch, single = (
            (model(**e).last_hidden_state * e["attention_mask"].unsqueeze(-1)).sum(1)
            / e["attention_mask"].sum(1, keepdim=True)
            for e in (encoding, alone)
        )
    torch.testing.assert_close(batch[:1], single, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def wide(texts, tmp_path_factory):
    """A quantized encoder that can be compiled."""
    pytest.importorskip("llvmlite")
    folder = tmp_path_factory.mktemp("wide")
    made = build("bert", SIZES)
    made.config.architectures = [type(made).__name__]
    made.save_pretrained(folder / "dense")
    make_tokenizer().save_pretrained(folder / "dense")
    model = AutoAWQForEmbedding.from_pretrained(str(folder / "dense"))
    settings = {"q_group_size": 32}
    model.quantize(texts=texts, quant_config=settings, preset="fast", general_texts=False)
    model.save_quantized(folder / "quantized")
    return str(folder / "quantized")


@torch.no_grad()
def test_the_model_of_a_cpu_runs_compiled(wide, texts):
    """It gives what its plain forward gives, and calls that ask for more get it there."""
    from awq.embed.body import plain_forward
    from awq.integrations.emb_model_provider import AutoAWQLoader

    model, tokenizer = AutoAWQLoader(wide, device="cpu").load_model()
    plain = plain_forward(model)
    inputs = tokenizer([*texts, "a"], padding=True, truncation=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    types = torch.arange(inputs["input_ids"].numel()).view_as(inputs["input_ids"]) % 2
    seen = inputs["attention_mask"].bool()
    for given in (inputs, inputs | {"token_type_ids": types}, {"input_ids": types + 5}):
        kept = seen if "attention_mask" in given else torch.ones_like(seen)
        found, expected = model(**given), plain(**given)
        torch.testing.assert_close(
            found.last_hidden_state[kept], expected.last_hidden_state[kept], atol=2e-5, rtol=1e-4
        )
        assert found.last_hidden_state.dtype == torch.float32
        if expected.pooler_output is not None:
            torch.testing.assert_close(
                found.pooler_output, expected.pooler_output, atol=2e-5, rtol=1e-4
            )
    assert model.forward.state, model.forward.state.reason
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs).last_hidden_state, plain(**inputs).last_hidden_state)
    # what the program does not give
    assert model(**inputs, output_hidden_states=True).hidden_states is not None
    found = model(**inputs).last_hidden_state  # compiled: nothing stands where padding is
    assert not found[~seen].any()
    assert isinstance(model(**inputs, return_dict=False), tuple)
    left = inputs | {"attention_mask": inputs["attention_mask"].flip(1)}
    assert torch.equal(model(**left).last_hidden_state, plain(**left).last_hidden_state)
    with torch.enable_grad():
        assert model(**inputs).last_hidden_state.requires_grad
    calls = []
    linear = next(m for m in model.modules() if isinstance(m, WQLinear))
    hook = linear.register_forward_hook(lambda *_: calls.append(1))
    model(**inputs)
    hook.remove()
    assert calls
    with pytest.raises(IndexError):
        model(**inputs, token_type_ids=types + 2)


def test_the_hosts_own_loader_reads_the_directory_too(quantized):
    import transformers
    from transformers import AutoModel

    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    model = AutoModel.from_pretrained(
        quantized, **{name: torch.float32}, low_cpu_mem_usage=False, trust_remote_code=False
    )
    assert sum(isinstance(m, WQLinear) for m in model.to("cpu").modules()) == 18


@pytest.mark.parametrize(
    "device, message", [("tpu", 'use "auto"'), ("cuda:x", 'use "auto"'), ("cuda:99", "GPUs")]
)
def test_device(loader_class, quantized, device, message):
    with pytest.raises(ConfigError, match=message):
        loader_class(quantized, device=device)
    loader = loader_class(quantized)
    assert loader.get_device("cpu") == "cpu" and loader.get_device() in ("cpu", "cuda")


def test_bad_input(loader_class, bert_dir, quantized, tmp_path):
    for name in ("", "  ", None):
        with pytest.raises(ConfigError, match="hub id"):
            loader_class(name)
    with pytest.raises(ConfigError, match="awq quantize"):
        loader_class(str(bert_dir)).load_model()
    missing = loader_class(str(tmp_path / "nothing"))
    with pytest.raises(AwqError, match="nothing"):
        missing.load_model()
    assert not missing.is_model_available() and not loader_class(str(bert_dir)).is_model_available()
    assert missing.validate_model() is False
    info = missing.get_model_info()
    assert info["loaded"] is False and info["vocab_size"] is None and "nothing" in info["error"]


def test_without_tokenizer_it_says_so(loader_class, quantized, tmp_path):
    import shutil

    shutil.copytree(
        quantized,
        tmp_path / "bare",
        ignore=shutil.ignore_patterns("tokenizer*", "special*", "vocab*"),
    )
    with pytest.raises(AwqError, match="tokenizer"):
        loader_class(str(tmp_path / "bare")).load_model()
