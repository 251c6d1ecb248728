"""Pushing to a hub that runs on this machine, through the hub's own client; and what is refused
before any work."""

import json
import time

import pytest
from hub import running
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import _http as http

from awq import AutoAWQForCausalLM, Encoder
from awq.checkpoint.card import with_name, write_card
from awq.checkpoint.hub import check_push, push_directory
from awq.checkpoint.source import Source
from awq.cli import main
from awq.config import AwqConfig
from awq.embed.directory import is_sentence_model
from awq.errors import AwqError, CheckpointError, ConfigError, ModelError


@pytest.fixture
def online(monkeypatch):
    """Offline mode is read when a session is made; before huggingface_hub 1.0 sessions are kept."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    forget = getattr(http, "reset_sessions", lambda: None)
    forget()
    yield
    forget()


@pytest.fixture
def no_token(online, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(no_token, monkeypatch):
    with running() as one:
        monkeypatch.setattr(constants, "ENDPOINT", one.address)
        monkeypatch.setenv("HF_TOKEN", "good")
        yield one


@pytest.fixture(scope="module")
def place(llama_dir, texts, tmp_path_factory):
    """Texts, and `q`, a quantized model."""
    root = tmp_path_factory.mktemp("hub")
    (root / "t.txt").write_text("\n\n".join(texts))
    assert main(command(llama_dir, root / "q", root)) == 0
    return root


def command(source, output, place, *more):
    options = ["--calib-data", place / "t.txt", "--group-size", 16, "--preset", "fast", *more]
    return ["quantize", *map(str, (source, output, *options))]


def files_of(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_quantize_and_push(hub, llama_dir, place, tmp_path, capsys):
    pushed = ["--push", "the-org/llama-awq", "--private", "--json"]
    assert main(command(llama_dir, tmp_path / "q", place, *pushed)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pushed"] == f"{hub.address}/the-org/llama-awq/commit/0a1b"
    assert hub.private == {"the-org/llama-awq"} and len(hub.commits) == 1
    sent, saved = hub.repositories["the-org/llama-awq"], files_of(tmp_path / "q")
    card = sent.pop("README.md").decode()
    del saved["README.md"]
    assert sent == saved
    assert "# the-org/llama-awq\n" in card and 'from_quantized("the-org/llama-awq"' in card
    assert ModelCard(card).data.library_name == "transformers"


def test_a_model_pushes_itself_with_everything_that_belongs_to_it(hub, place):
    model = AutoAWQForCausalLM.from_quantized(str(place / "q"))
    address = model.push_to_hub("me/again", commit_message="again")
    assert address.startswith(f"{hub.address}/me/again/") and hub.commits == ["again"]
    assert set(hub.repositories["me/again"]) >= {"config.json", "tokenizer.json", "README.md"}
    push_directory(place / "q", "me/again")  # into a repository that is there
    for name, content in files_of(place / "q").items():
        assert name == "README.md" or hub.repositories["me/again"][name] == content


def test_a_gate_that_fails_pushes_nothing(hub, llama_dir, place, tmp_path, capsys):
    gate = ["--evaluate", place / "t.txt", "--max-kl", 0, "--push", "me/q"]
    assert main(command(llama_dir, tmp_path / "q", place, *gate)) == 1
    assert (tmp_path / "q/config.json").is_file() and not hub.repositories
    assert "pushed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "repository, token, words",
    [
        ("alone", "good", "owner/name"),
        ("a/b/c", "good", "a/b/c"),
        ("me/with space", "good", "with space"),
        ("me/q", "unknown", "does not accept the token"),
        ("me/q", "reader", "may only read"),
        ("someone/q", "good", "may not write to someone; push to one of me, the-org"),
    ],
)
def test_refused_before_any_work(
    hub, place, llama_dir, tmp_path, capsys, monkeypatch, repository, token, words
):
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(command(llama_dir, tmp_path / "q", place, "--push", repository)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("awq quantize: ") and words in line
    assert not (tmp_path / "q").exists() and not hub.repositories


def test_no_token_no_network_and_offline(no_token, monkeypatch):
    with pytest.raises(ConfigError, match="hf auth login"):
        check_push("me/q")
    monkeypatch.setenv("HF_TOKEN", "good")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="hf upload me/q"):
        check_push("me/q")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        check_push("me/q")


def test_a_model_that_could_not_be_sent_is_saved(hub, place, llama_dir, tmp_path, capsys):
    hub.refuses_commits = True
    assert main(command(llama_dir, tmp_path / "q", place, "--push", "me/q")) == 2
    assert f"`hf upload me/q {tmp_path}/q` sends it later" in capsys.readouterr().err
    assert (tmp_path / "q/config.json").is_file()
    with pytest.raises(AwqError, match="no saved model"):
        push_directory(tmp_path / "nothing", "me/q")


@pytest.mark.parametrize("look", [Source.open, is_sentence_model, Encoder.from_pretrained])
def test_a_model_that_is_nowhere_is_told_after_one_request(no_token, monkeypatch, look):
    """The client of the hub would try six times; the address is one where nothing listens."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.perf_counter()
    with pytest.raises(ModelError, match="my-model does not exist as a directory, and the hub"):
        look("my-model")
    assert time.perf_counter() - start < 10


def test_private_without_a_repository(capsys):
    assert main(["quantize", "m", "o", "--private"]) == 2
    assert "--push" in capsys.readouterr().err


def test_a_renamed_card_is_the_card_of_that_name(place, tmp_path):
    (tmp_path / "config.json").write_bytes((place / "q/config.json").read_bytes())
    cards = {}
    for name in ("model", "owner/other"):
        write_card(tmp_path, AwqConfig(group_size=64), name=name)
        cards[name] = (tmp_path / "README.md").read_bytes()
    assert b"vllm serve owner/other" in cards["owner/other"]
    assert with_name(cards["model"], "owner/other") == cards["owner/other"]
    assert with_name(b"no title", "owner/other") == b"no title"
