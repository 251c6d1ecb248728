"""Serving from threads: first calls at once, and building, saving, training, copying beside running
calls."""

import copy
import pickle
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import pytest
import thread_cases
import torch
import zoo
from transformers import AutoModel

from awq.checkpoint.load import load_model
from awq.embed.encoder import Encoder
from awq.errors import ConfigError
from awq.generate.run.projection import Slice
from awq.integrations.emb_model_provider import AutoAWQLoader
from awq.models.base import BaseAWQForCausalLM
from awq.nn.copies import copy_structure
from awq.nn.layout import prepare, restore
from awq.nn.linear import WQLinear
from awq.nn.locks import lock_of

SEED = 0


@pytest.fixture(scope="module")
def case():
    return thread_cases.Case("qwen2")


@pytest.fixture(scope="module")
def unfused_case():
    return thread_cases.Case("bloom")


def test_first_callers(case, unfused_case):
    dice = random.Random(SEED)
    wrong = [
        line for c in (case, case, unfused_case) for line in thread_cases.first_callers(c, dice)
    ]
    assert not wrong, f"seed {SEED}: {wrong[:5]}"


def test_everything_at_once(case, unfused_case):
    dice = random.Random(SEED)
    wrong = [
        line for c in (case, unfused_case) for line in thread_cases.everything_at_once(c, dice)
    ]
    assert not wrong, f"seed {SEED}: {wrong[:5]}"


def test_quantizations_that_change_settings_of_torch_take_turns(case):
    """Tuning wants deterministic gradients of the whole process; each of two callers puts the
    setting back."""

    def tuned(_number):
        model = BaseAWQForCausalLM(copy.deepcopy(case.dense), "./tiny-qwen2")
        settings = {"quant_config": thread_cases.SETTINGS, "progress": False}
        model.quantize(case.rows, preset="fast", tuning=1, **settings)
        return model.model.state_dict()

    alone = tuned(0)
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(tuned, range(3)))
    for found in together:
        assert all(torch.equal(found[name], tensor) for name, tensor in alone.items())
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest"


def test_each_deed_is_right_alone(case):
    model = case.fresh()
    for name in thread_cases.DEEDS:
        assert getattr(case, name)(model, 3), name


def test_copies_hold_weights_of_their_own(case):
    """A copy of a fused model is an unfused one: nothing that happens to one of them reaches the
    other."""
    model = case.fresh()
    assert case.generates(model, 0) and any(isinstance(m, Slice) for m in model.modules())
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model.model),
    ):
        assert not any(isinstance(m, Slice) for m in twin.modules())
        assert not _addresses(twin) & _addresses(model)
        for module in twin.modules():
            if isinstance(module, WQLinear):
                module.scales.zero_()
    assert case.generates(model, 0) and case.runs_forward(model, 0)


def _addresses(model):
    tensors = (*model.parameters(), *model.buffers())
    return {tensor.data_ptr() for tensor in tensors if tensor.numel()}


def test_a_graph_is_made_anew_when_weights_lie_elsewhere(case, monkeypatch):
    """A graph reads addresses. On a GPU it went on with memory that a change of layout had given
    back. Here a stand-in for a graph runs the step again, and says how many there were."""
    from awq.generate.run import graph

    made = []

    class Replayed:
        def __init__(self, function):
            self.function = function
            made.append(function)

        def replay(self):
            self.function()

    monkeypatch.setattr(graph, "capture", lambda function: (Replayed(function), None))
    monkeypatch.setattr(graph, "on_stream", lambda _stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: None)
    model = case.fresh()
    decoder = model.fuse()
    decoder.graphable = True
    linear = next(m for m in model.model.modules() if isinstance(m, WQLinear))
    before = weakref.ref(linear.qweight)
    for layout in (None, linear.format, None):
        if layout is not None:
            restore(model.model)
            assert before() is not None, "a graph that may be running reads it"
        assert case.generates(model, 0) and case.generates(model, 0)
    assert len(made) == 2 and before() is None


def test_experts_change_their_layout_beside_forwards():
    """Codes of one layout and zeros of another never meet."""
    from test_experts import mixture

    model = BaseAWQForCausalLM(mixture("mixtral"), "./tiny-mixtral")
    rows = torch.randint(4, 60, (8, 16), generator=torch.Generator().manual_seed(0))
    model.quantize(rows, quant_config={"q_group_size": 16}, preset="fast", progress=False)
    ids = rows[:2, :6]
    with torch.no_grad():
        expected = model(ids).logits
    wrong, ended = [], threading.Event()

    def forwards():
        while not ended.is_set():
            with torch.no_grad():
                found = model(ids).logits
            if not thread_cases._close(found, expected):
                wrong.append(float((found - expected).norm()))

    threads = [threading.Thread(target=forwards) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        restore(model.model)
        prepare(model.model)
    ended.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_copy_of_the_structure_shares_every_tensor(case):
    model = case.model.model
    twin = copy_structure(model)
    assert _addresses(twin) == _addresses(model)
    assert not {id(module) for module in twin.modules()} & {
        id(module) for module in model.modules()
    }


def test_one_lock_for_each_model(case):
    first, second = case.fresh(), case.fresh()
    assert lock_of(first.model) is lock_of(first.model) and lock_of(first.model) is not lock_of(
        second.model
    )
    with ThreadPoolExecutor(16) as pool:
        assert len({id(lock) for lock in pool.map(lambda _: lock_of(second), range(64))}) == 1


def test_a_streamer_that_calls_the_model(case):
    """From within a running generate: another generate is right, taking the model apart is
    refused."""
    model, answers = case.fresh(), []

    class Curious(thread_cases.Streamer):
        def put(self, value):
            answers.append(case.generates(model, 1) and case.runs_forward(model, 2))
            with pytest.raises(ConfigError, match="is generating"):
                model.unfuse()

    prompt = case.prompts[0]
    tokens = model.generate(
        **prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, streamer=Curious()
    )
    assert torch.equal(tokens, case.tokens[0]) and len(answers) == 9 and all(answers)


def test_memory_of_an_outsized_request_goes_back(case):
    model = case.fresh()
    model.fuse_layers(64, batch_size=2)
    for rows, kept in ((1, 2), (40, 0), (2, 2)):
        batch = zoo.token_batch(rows, 5)
        model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
        cache = model.fuse().cache
        assert (cache[0].k.shape[0] if cache else 0) == kept


REQUESTS = {
    "a list": (dict(input_ids=[[5, 6]]), "list"),
    "one dimension": (dict(input_ids=torch.tensor([5, 6])), "shape"),
    "numbers that are no ids": (dict(input_ids=torch.tensor([[5.0, 6.0]])), "float32"),
    "no token": (dict(input_ids=torch.zeros(1, 0, dtype=torch.long)), "no token"),
    "an id too large": (dict(input_ids=torch.tensor([[5, 64]])), "hold 64"),
    "an id below zero": (dict(input_ids=torch.tensor([[-1, 6]])), "hold -1"),
    "a mask of more rows": (
        dict(input_ids=torch.tensor([[5, 6]]), attention_mask=torch.ones(2, 2)),
        "attention_mask",
    ),
    "a mask of more tokens": (
        dict(input_ids=torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 3)),
        "attention_mask",
    ),
    "a mask that is a list": (
        dict(input_ids=torch.tensor([[5, 6]]), attention_mask=[[1, 1]]),
        "list",
    ),
    "a mask that hides all": (
        dict(input_ids=torch.tensor([[5, 6]]), attention_mask=torch.zeros(1, 2)),
        "empty",
    ),
    "a word for a number": (
        dict(input_ids=torch.tensor([[5, 6]]), max_new_tokens="x"),
        "max_new_tokens",
    ),
    "fewer than no tokens": (
        dict(input_ids=torch.tensor([[5, 6]]), max_new_tokens=-1),
        "max_new_tokens",
    ),
}


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("fused", [True, False])
def test_requests_that_cannot_be_meant(case, request_, fused):
    model = case.fresh() if fused else copy.deepcopy(case.model)
    given, what = REQUESTS[request_]
    with pytest.raises(ConfigError, match=what):
        model.generate(**{"max_new_tokens": 3, **given})


@pytest.fixture(scope="module")
def encoder_dir(bert_dir, tmp_path_factory):
    from awq import AutoAWQForEmbedding

    model = AutoAWQForEmbedding.from_pretrained(str(bert_dir))
    rows = [
        torch.randint(4, 27, (16,), generator=torch.Generator().manual_seed(i)) for i in range(8)
    ]
    model.quantize(rows, quant_config=thread_cases.SETTINGS | {"q_group_size": 16}, preset="fast")
    folder = tmp_path_factory.mktemp("encoder") / "model"
    model.save_quantized(folder)
    return folder


def test_first_texts_at_once(encoder_dir, texts):
    expected = Encoder.from_pretrained(encoder_dir, "cpu").encode(texts[:8])
    encoder = Encoder.from_pretrained(encoder_dir, "cpu")
    with thread_cases.quick_switches(), ThreadPoolExecutor(16) as pool:
        found = list(
            pool.map(lambda i: (i, encoder.encode([texts[i]])[0]), [i % 8 for i in range(48)])
        )
    assert all(torch.allclose(embedding, expected[i], atol=1e-5) for i, embedding in found)


def test_a_loader_loads_once(encoder_dir):
    loader = AutoAWQLoader(str(encoder_dir), device="cpu")
    with thread_cases.quick_switches(), ThreadPoolExecutor(16) as pool:
        pairs = list(pool.map(lambda _: loader.load_model(), range(16)))
    assert len({(id(model), id(tokenizer)) for model, tokenizer in pairs}) == 1
    loader.cleanup()
    assert loader.load_model()[0] is not pairs[0][0]


def test_models_of_two_dtypes_loaded_at_once(encoder_dir):
    before, kinds = torch.get_default_dtype(), (torch.float32, torch.bfloat16)
    with thread_cases.quick_switches(), ThreadPoolExecutor(8) as pool:
        models = list(
            pool.map(lambda i: load_model(encoder_dir, kinds[i % 2], kind=AutoModel), range(8))
        )
    for i, model in enumerate(models):
        assert {p.dtype for p in model.parameters()} == {kinds[i % 2]}
    assert torch.get_default_dtype() == before


class Registry:
    """torch's graph, as far as threads meet it: recording and dropping change one set, and at once
    they break it."""

    busy = threading.Lock()
    clashes = 0
    alive = 0

    def __init__(self):
        Registry.alive += 1

    def touch(self):
        if not Registry.busy.acquire(blocking=False):
            Registry.clashes += 1
            return
        time.sleep(1e-4)
        Registry.busy.release()

    def replay(self):
        pass

    def __del__(self):
        self.touch()
        Registry.alive -= 1


def test_graphs_are_dropped_by_any_thread_and_never_while_another_is_recorded(monkeypatch):
    from awq.nn import capture

    @contextmanager
    def record(recording, **_):
        for _ in range(5):
            recording.touch()
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Registry)
    monkeypatch.setattr(torch.cuda, "graph", record)

    def rounds():
        kept = None
        for _ in range(40):
            kept, result = capture.capture(lambda: 7)
            assert result == 7
            kept.replay()
        del kept

    threads = [threading.Thread(target=rounds) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    capture.capture(lambda: 0)  # frees what was dropped while another recorded
    assert Registry.clashes == 0
    assert Registry.alive == 0

    def fails():
        raise RuntimeError("no")

    monkeypatch.setattr(capture, "_failed", [])
    with pytest.raises(RuntimeError, match="no"):
        capture.capture(fails)
    assert Registry.alive == 1  # kept for good: whoever holds the traceback may drop it anywhere
    assert capture.capture(lambda: 1)[1] == 1
    capture._failed.clear()


def test_quantizations_on_gpus_follow_each_other():
    """Those on a CPU, which change no setting of the process, run at once."""
    from awq.quantize.options import QuantizeOptions
    from awq.quantize.run import one_at_a_time

    running = {"cuda": 0, "cpu": 0}
    most = dict(running)
    both = threading.Barrier(2)

    def quantizes(kind):
        with one_at_a_time(torch.device(kind), QuantizeOptions()):
            running[kind] += 1
            most[kind] = max(most[kind], running[kind])
            if kind == "cpu":
                both.wait(60)
            time.sleep(0.01)
            running[kind] -= 1

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(quantizes, ["cuda", "cpu", "cuda", "cpu", "cuda"]))
    assert most == {"cuda": 1, "cpu": 2}
