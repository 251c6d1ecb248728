"""`NativeEncoder` gives what `Encoder` gives; what was changed on disk is not used."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from test_compiled_encoder import SIZES
from test_encoder import sentence_directory
from zoo import build

from awq import AutoAWQForEmbedding, Encoder, NativeEncoder
from awq.embed.heads import Pooling
from awq.embed.prepare import prepare
from awq.embed.tokens import TRIED
from awq.errors import ConfigError, ModelError
from awq.native import store
from awq.native.team import Team

pytest.importorskip("llvmlite")

NAME = "a.encoder"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "own"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWQ_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def directory(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    model = build("bert", SIZES)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    model = AutoAWQForEmbedding.from_pretrained(
        sentence_directory(folder / "model", folder / "dense", normalize=True)
    )
    model.quantize(
        texts=texts, quant_config={"q_group_size": 32}, preset="fast", general_texts=False
    )
    model.save_quantized(folder / "quantized")
    return folder / "quantized"


@pytest.fixture(scope="module")
def both(directory, cache):
    prepare(directory, "auto", "exact")
    return NativeEncoder.from_pretrained(directory), Encoder.from_pretrained(directory, "cpu")


def test_it_gives_the_bits_of_encoder(both, texts):
    native, encoder = both
    for given in (texts, [*TRIED, " ".join(texts)]):
        assert torch.equal(torch.from_numpy(native.encode(given)), encoder.encode(given))
    alone = native.encode(texts[3], prompt="a quick ", truncate_dim=8, normalize=True)
    want = encoder.encode(texts[3], prompt="a quick ", truncate_dim=8, normalize=True)
    np.testing.assert_allclose(alone, want.numpy(), atol=1e-6)
    assert native.max_seq_length == encoder.max_seq_length


def test_many_threads_get_the_same_bits(both, texts):
    native, _ = both
    alone = [native.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(native.encode, texts))
    assert all(np.array_equal(a, b) for a, b in zip(alone, found))


@pytest.mark.parametrize("wrong", [[], [1], None, b"a", {"a": 1}])
def test_what_is_no_text(both, wrong):
    with pytest.raises(ConfigError, match="text"):
        both[0].encode(wrong)


def test_a_process_needs_neither_torch_nor_transformers(directory, both, texts):
    code = (
        "import sys; from awq import NativeEncoder\n"
        f"found = NativeEncoder.from_pretrained({str(directory)!r}).encode({texts[0]!r})\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "print(found.tobytes().hex())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == both[0].encode(texts[0]).tobytes().hex(), done.stderr


def test_a_model_that_cannot_be_compiled_says_why(bert_dir, cache, tmp_path):
    with pytest.raises(ModelError, match="not quantized"):
        NativeEncoder.from_pretrained(sentence_directory(bert_dir, tmp_path / "dense"))
    with pytest.raises(ModelError, match="does not exist"):
        NativeEncoder.from_pretrained(tmp_path / "nowhere")


@pytest.fixture
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("AWQ_CACHE", str(tmp_path / "own"))
    assert store.save(NAME, b"content" * 100)
    assert store.load(NAME) == b"content" * 100
    return tmp_path / "own"


def test_a_store_is_for_its_owner_alone(own_store):
    assert (own_store.stat().st_mode & 0o777, (own_store / NAME).stat().st_mode & 0o777) == (
        0o700,
        0o600,
    )


def _damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


FAULTS = {
    "a bit": lambda folder: _damage(folder / NAME),
    "cut": lambda folder: os.truncate(folder / NAME, 90),
    "empty": lambda folder: os.truncate(folder / NAME, 0),
    "another's name": lambda folder: os.replace(folder / NAME, folder / "b.encoder"),
    "others may write to it": lambda folder: os.chmod(folder / NAME, 0o666),
    "others may write to its folder": lambda folder: os.chmod(folder, 0o777),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_was_changed_is_not_used(own_store, fault):
    FAULTS[fault](own_store)
    assert store.load(NAME) is None
    assert store.load("b.encoder") is None


def test_links_are_not_followed(own_store, tmp_path, monkeypatch):
    os.replace(own_store / NAME, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", own_store / NAME)
    assert store.load(NAME) is None
    os.symlink(own_store, tmp_path / "link")
    monkeypatch.setenv("AWQ_CACHE", str(tmp_path / "link"))
    assert store.load(NAME) is None and not store.save(NAME, b"")


def test_files_of_other_users_are_not_used(own_store, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: os.stat(own_store).st_uid + 1)
    assert store.load(NAME) is None and not store.save(NAME, b"x")


def test_the_oldest_files_make_room(own_store, monkeypatch):
    monkeypatch.setattr(store, "MAX_BYTES", 1500)
    os.utime(own_store / NAME, (1, 1))
    assert store.save("b", b"x" * 700) and store.save("c", b"y" * 700)
    assert not (own_store / NAME).exists() and store.load("b") is not None
    monkeypatch.setenv("AWQ_CACHE", "off")
    assert store.load("b") is None and not store.save("d", b"")


def test_nothing_falls_back_in_silence(both, caplog):
    """What torch runs instead is logged with the reason; for texts, the first time."""
    _, encoder = both
    too_long = [[1] * (encoder.native.runner.image.longest + 1)]
    assert not encoder.native.takes(too_long) and not encoder.native.takes(too_long)
    other = Encoder(encoder.model, encoder.tokenizer, [Pooling(("max",))])
    assert not other.compiled
    assert "pooling of max" in other.compiled.reason
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert sum("positions end" in text for text in warnings) == 1
    assert sum("pooling of max" in text for text in warnings) == 1


def test_a_cold_first_call_does_not_keep_helpers_away():
    seconds = {True: 1.0, False: 1.8}
    team = Team()
    taken = []
    for i in range(Team.RETRY_CALLS - 1):
        together = team.is_worth_it()
        team.note(together, 10.0 if i == 0 else seconds[together])
        taken.append(together)
    assert taken.count(False) == 1
