"""Greedy calls, whose tokens the decoder chooses itself: they are transformers' own, and nothing
else goes that way."""

import offline
import pytest
import torch
import zoo
from transformers import MaxTimeCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from awq.generate.run.greedy import MOST_ENDS, Greedy
from awq.generate.run.loop import _Run
from awq.models.base import BaseAWQForCausalLM

NEW = 24


@pytest.fixture(scope="module")
def llama():
    return zoo.tiny_model("llama")


def wrapped(model):
    wrapper = BaseAWQForCausalLM(model, "tiny")
    wrapper.fuse_layers(64, 4)
    return wrapper


def prompts(device="cpu"):
    """Four left-padded prompts of different lengths."""
    batch = zoo.token_batch(4, 9)
    for row, padding in enumerate((0, 3, 8, 1)):
        batch["attention_mask"][row, :padding] = 0
        batch["input_ids"][row, :padding] = 0
    return {name: tensor.to(device) for name, tensor in batch.items()}


def settings(**more):
    return dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0) | more


def refused(*_):
    raise AssertionError("the call went the other way")


class Log(BaseStreamer):
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(value.tolist())

    def end(self):
        self.seen.append("end")


def ends_of(model, count, device="cpu"):
    """`count` tokens at which rows of the prompts end early and at different places."""
    free = model.generate(**prompts(device), **settings(eos_token_id=None))[:, 9:]
    return [int(free[row, 5 + 3 * row]) for row in range(count)]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_rows_end_where_transformers_ends_them(llama, monkeypatch, count):
    monkeypatch.setattr(_Run, "_one_by_one", refused)
    wrapper, log = wrapped(llama), Log()
    kwargs = prompts() | settings(eos_token_id=ends_of(llama, count) or None)
    theirs = llama.generate(**kwargs)
    for _ in range(2):
        ours = wrapper.generate(**kwargs)
        assert torch.equal(ours, theirs)
        assert ours.dtype == torch.int64 and not ours.is_inference()
    one = {name: tensor[:1] for name, tensor in prompts().items()}
    alone = settings(eos_token_id=kwargs["eos_token_id"])
    ours = wrapper.generate(**one, **alone, streamer=log)
    assert torch.equal(ours, llama.generate(**one, **alone))
    assert log.seen[1:] == [*([token] for token in ours[0, 9:].tolist()), "end"]


def test_some_rows_did_end_early(llama):
    ids = llama.generate(**prompts(), **settings(eos_token_id=ends_of(llama, 3)))
    assert (ids[:, -1] == 0).any() and len(ids[0]) > 14


def test_a_dictionary_without_scores(llama, monkeypatch):
    monkeypatch.setattr(_Run, "_one_by_one", refused)
    kwargs = prompts() | settings(return_dict_in_generate=True, eos_token_id=None)
    ours, theirs = wrapped(llama).generate(**kwargs), llama.generate(**kwargs)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert ours.scores is None and ours.logits is None


@pytest.mark.parametrize(
    "more",
    [
        dict(do_sample=True),
        dict(min_new_tokens=4),
        dict(repetition_penalty=1.3),
        dict(output_scores=True, return_dict_in_generate=True),
        dict(stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(1000.0)])),
        dict(eos_token_id=list(range(60, 60 - MOST_ENDS - 1, -1))),
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_looks_at_more_goes_token_by_token(llama, monkeypatch, more):
    monkeypatch.setattr(_Run, "_greedy", refused)
    kwargs = prompts() | settings() | more
    wrapper = wrapped(llama)
    torch.manual_seed(0)
    theirs = llama.generate(**kwargs)
    torch.manual_seed(0)
    ours = wrapper.generate(**kwargs)
    same = torch.equal if torch.is_tensor(ours) else lambda a, b: torch.equal(a[0], b[0])
    assert same(ours, theirs)


def test_ties_and_numbers_that_are_none_go_as_in_torch():
    logits = torch.tensor([[1.0, 3.0, 3.0], [float("nan"), 9.0, 1.0], [0.0, -1.0, -2.0]])
    state = Greedy(3, torch.device("cpu"))
    state.begin(logits, [4, 5, 6], ends=[0], padding=7)
    assert torch.equal(state.ids, logits.argmax(-1))
    assert state.found.tolist() == [*logits.argmax(-1).tolist(), 1]
    state.note(logits)
    assert state.ids.tolist() == [1, 7, 7] and state.lengths.tolist() == [4, 5, 6]


@pytest.mark.parametrize("target", [80, 90, "gfx942"])
def test_the_choice_compiles(target):
    from awq.kernels.triton.choosing import choose_token_kernel

    arguments = {"logits": "*fp32", "ids": "*i64", "going": "*i1", "found": "*i64", "ends": "*i64"}
    arguments |= {"padding": "*i64", "best": "*i64", "arrived": "*i32"}
    arguments |= {"batch": "i32", "vocabulary": "i32"}
    constants = {"BLOCK": 2048, "ROWS": 8, "ENDS": 16, "PDL": offline.starts_early(target)}
    code = offline.compile_kernel(
        choose_token_kernel, target, arguments, constants, {"num_warps": 4}
    )
    assert len(code.binary) > 1000 and code.spilled == 0


@pytest.mark.gpu
def test_a_graph_holds_the_choice():
    model = zoo.tiny_model("llama").cuda()
    wrapper = wrapped(model)
    for count in (0, 3, 1, 0):
        kwargs = prompts("cuda") | settings(eos_token_id=ends_of(model, count, "cuda") or None)
        for _ in range(2):
            assert torch.equal(wrapper.generate(**kwargs), model.generate(**kwargs))
    assert list(wrapper.fuse().greedy_graphs) == [4]
