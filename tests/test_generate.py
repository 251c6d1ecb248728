"""Fused generation: what transformers' own loop on its own blocks gives, token for token."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from transformers import (
    DynamicCache,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer
from transformers.models.moshi import modeling_moshi

from awq import AutoAWQForCausalLM
from awq.errors import ConfigError
from awq.generate import NotFusable, build_decoder, build_static, prove
from awq.generate.prove_static import why_not_static
from awq.generate.run import body
from awq.generate.run.loop import generate_fused
from awq.models.base import BaseAWQForCausalLM
from awq.nn.capture import NothingFromTheHost, NoWaiting
from awq.nn.linear import WQLinear

HERE = Path(__file__).parent
ALIBI = {"bloom", "mpt"}
ROPE = {
    "llama3": dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    "linear": dict(rope_type="linear", factor=2.0),
}


@pytest.fixture
def llama():
    return zoo.tiny_model("llama")


def wrapped(model, max_seq_len=128, batch_size=1):
    wrapper = BaseAWQForCausalLM(model, "tiny")
    wrapper.fuse_layers(max_seq_len, batch_size)
    return wrapper


def prompts(rows=4, length=9):
    """Left-padded prompts of different lengths, one of a single token."""
    batch = zoo.token_batch(rows, length)
    for row, padding in enumerate((0, 3, length - 1, 1)[:rows]):
        batch["attention_mask"][row, :padding] = 0
        batch["input_ids"][row, :padding] = 0
    return batch


def both(model, wrapper, **kwargs):
    """The same call through transformers' loop and through ours, both from the same random
    state."""
    results = []
    for run in (model.generate, wrapper.generate):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(run(**kwargs))
    return results


def cuts_its_own_window(family):
    """Gemma 3 before 4.52 cuts its window inside of its blocks, where no mask shows it."""
    return family == "gemma3_text" and not hasattr(PreTrainedModel, "set_attn_implementation")


@pytest.mark.parametrize("family", zoo.DECODERS)
def test_greedy_equals_transformers(family):
    if not zoo.available(family):
        pytest.skip(f"transformers has no {family}")
    # families name it differently
    positions = dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 96)
    model = zoo.build(family, zoo.DECODERS[family] | positions)
    wrapper = wrapped(model, 80)
    for rows in (1, 4):
        theirs, ours = both(
            model,
            wrapper,
            **prompts(rows),
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
        )
        assert ours.shape == (rows, 73) and torch.equal(ours, theirs)
    assert len(theirs.unique()) > 8  # a model that says one token would show nothing
    # releases differ in who uses it
    interface = hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")
    fusable = interface and family not in ALIBI and not cuts_its_own_window(family)
    assert (wrapper.fusion.state == "fused") == fusable, wrapper.fusion


def test_an_attention_argument_that_is_not_known_is_refused(llama):
    attention = llama.model.layers[1].self_attn
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"tilt": torch.ones(4)}), with_kwargs=True
    )
    with pytest.raises(NotFusable, match="attention takes tilt"):
        build_decoder(llama, 64)


def test_multiplied_embeddings_beside_absolute_positions():
    """The factor of the embedding and the positions are told apart: ctrl multiplies by √features
    and adds sines."""
    model = zoo.build("ctrl", dict(n_embd=32, n_head=4, n_layer=2, dff=48, n_positions=96))
    wrapper = wrapped(model)
    for rows in (1, 4):
        theirs, ours = both(
            model, wrapper, **prompts(rows), max_new_tokens=40, do_sample=False, pad_token_id=0
        )
        assert torch.equal(ours, theirs)
        interface = hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")
        assert (wrapper.fusion.state == "fused") == interface


def test_what_surrounds_the_blocks_is_proven_too(llama, monkeypatch):
    plain = prove._read_and_prove
    monkeypatch.setattr(
        prove, "_read_and_prove", lambda *args: replace(plain(*args), embedding_factor=1.5)
    )
    with pytest.raises(NotFusable, match="logits differ from transformers'"):
        build_decoder(llama, 64)
    assert isinstance(llama.model.layers[0].mlp.up_proj, torch.nn.Linear)


def test_logits_that_are_not_finite_prove_nothing(llama, caplog):
    model = copy.deepcopy(llama).half()
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.down_proj.weight.sign_().mul_(6e4)
        mlp.up_proj.weight.mul_(100)
    build_decoder(model, 64)
    assert "own logits are not finite" in caplog.text
    with torch.no_grad():
        model.lm_head.weight[5] = torch.inf
    with pytest.raises(NotFusable, match="not finite"):
        build_decoder(model, 64)


@pytest.mark.parametrize("rope", ROPE)
def test_scaled_rotation(rope):
    name = (
        "rope_parameters"
        if hasattr(zoo.AutoConfig.for_model("llama"), "rope_parameters")
        else "rope_scaling"
    )
    model = zoo.build("llama", zoo.GQA | {name: {"rope_theta": 10000.0} | ROPE[rope]})
    wrapper = wrapped(model)
    theirs, ours = both(
        model, wrapper, **prompts(), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    assert torch.equal(ours, theirs) and wrapper.fusion.state == "fused"


def test_positions_that_the_model_knows_are_the_limit():
    """Rotary tables that change with the length, and tables of learned positions, end at
    max_position_embeddings."""
    name = (
        "rope_parameters"
        if hasattr(zoo.AutoConfig.for_model("llama"), "rope_parameters")
        else "rope_scaling"
    )
    dynamic = zoo.build(
        "llama", zoo.GQA | {name: dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0)}
    )
    for model in (dynamic, zoo.tiny_model("gpt2")):
        wrapper = wrapped(model, 256)
        theirs, ours = both(
            model, wrapper, **prompts(), max_new_tokens=55, do_sample=False, pad_token_id=0
        )
        assert torch.equal(ours, theirs) and wrapper.fusion.state == "fused"
        with pytest.raises(ConfigError, match="max_seq_len=64"):
            wrapper.generate(**prompts(), max_new_tokens=56)


def test_a_block_that_does_more_is_refused(llama):
    layer = llama.model.layers[1]
    plain = layer.mlp.down_proj.forward
    layer.mlp.down_proj.forward = lambda x: plain(x) * (1 + 1e-3 * x.abs().amax())
    with pytest.raises(NotFusable, match="differs from transformers'"):
        build_decoder(llama, 64)


@pytest.mark.parametrize(
    "settings",
    [
        dict(do_sample=True, temperature=0.7, top_k=12, top_p=0.9),
        dict(do_sample=True, min_p=0.05, repetition_penalty=1.3),
        dict(do_sample=False, repetition_penalty=1.5, no_repeat_ngram_size=2),
        dict(do_sample=False, eos_token_id=[5, 9, 11, 17, 23, 31, 40, 44, 50]),
        dict(do_sample=True, num_return_sequences=3),
        dict(num_beams=3, do_sample=False),
        dict(do_sample=False, max_length=30),
        dict(do_sample=False, stopping_criteria=StoppingCriteriaList([])),
    ],
    ids=lambda s: ", ".join(s),
)
def test_settings(llama, settings):
    wrapper = wrapped(llama)
    length = {} if "max_length" in settings else {"max_new_tokens": 20}
    theirs, ours = both(llama, wrapper, **prompts(), **settings, **length, pad_token_id=0)
    assert torch.equal(ours, theirs) and wrapper.fusion.state == "fused"


def test_prompt_lookup(llama):
    """transformers' own speculative decoding, over a model whose siblings are joined: equal tokens
    from fewer passes."""
    wrapper, passes = wrapped(llama), []
    prompt = {name: values.repeat(1, 3) for name, values in zoo.token_batch(1, 9).items()}
    kwargs = dict(**prompt, max_new_tokens=36, do_sample=False, pad_token_id=0)
    plain = wrapper.generate(**kwargs)
    llama.register_forward_hook(lambda *_: passes.append(1))
    assert (
        torch.equal(wrapper.generate(**kwargs, prompt_lookup_num_tokens=4), plain)
        and wrapper.fusion.state == "fused"
    )
    assert 0 < len(passes) < 30


UNFUSED = {
    "falcon": {},
    "gptj": {},
    "bloom": {},
    "mixtral": dict(num_key_value_heads=2, num_local_experts=4),
    "qwen3_moe": zoo.GQA | dict(num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2),
}


@pytest.mark.parametrize("family", UNFUSED)
def test_step_over_a_static_cache(family):
    """What a GPU captures of a model that is not fused, here without capture: equal tokens,
    whatever was called before."""
    positions = dict.fromkeys(("max_position_embeddings", "n_positions"), 96)
    model = zoo.build(family, zoo.DECODERS.get(family, {}) | UNFUSED[family] | positions)
    if isinstance(why_not_static(model), str):
        pytest.skip(f"transformers has no static step: {why_not_static(model)}")
    wrapper = wrapped(model, 80)
    if wrapper.fuse() is not None:
        # from 5.24 GPT-J uses the attention interface
        pytest.skip(f"transformers has no {family} that is not fused")
    assert wrapper.fusion.state != "pending"
    wrapper._capture()
    for rows, new in ((1, 64), (4, 64), (3, 9), (4, 30), (1, 12)):
        theirs, ours = both(
            model, wrapper, **prompts(rows), max_new_tokens=new, do_sample=False, pad_token_id=0
        )
        assert torch.equal(ours, theirs) and wrapper.fusion.state == "captured"
    with pytest.raises(ConfigError, match="max_seq_len=80"):
        wrapper.generate(**prompts(1), max_new_tokens=72)
    assert wrapper.to(torch.bfloat16).generate(**prompts(1), max_new_tokens=2).shape[1] <= 11
    assert wrapper.fusion.state != "captured"  # it was for float32


def test_nothing_from_the_host_changes_no_result():
    x = torch.arange(48.0).view(2, 3, 4, 2)
    reads = (
        lambda: torch.tensor(0.5, dtype=torch.float64),
        lambda: torch.tensor(True),
        lambda: torch.tensor(7),
        lambda: torch.tensor([1, 2]),
        lambda: x[:, :, [-2]],
        lambda: x[:, [-1]],
        lambda: x[:, [0], 1],
        lambda: x[[1]],
        lambda: x[:, [0, 2]],
        lambda: x[:, [True, False, True]],
        lambda: x[[0], :, [1]],
        lambda: x[..., [1], None, 0],
    )
    for read in reads:
        with NothingFromTheHost():
            found = read()
        assert torch.equal(found, read()) and found.dtype == read().dtype


def grown(table, count):
    """What XGLM and MPT ask of a cache: whether a table must grow, where a bias begins."""
    return table[max(0, 1 - (count + 1)) : max(3, 0)] if 2 + count > 130 else table


def test_what_a_count_cannot_change_is_not_asked_for():
    table = torch.arange(5)
    for number in (0, 1, 40, 64):
        count = torch.tensor(number)
        end, begin = count + 3, max(0, 1 - (count + 1))
        with NothingFromTheHost([count], most=64), NoWaiting("cpu"):
            assert max(0, 1 - (count + 1)) == begin
            same = grown(table, count)
            places = torch.arange(count, count + 3, device="cpu")
            assert not count < 0 and count + 1 >= 1 and count - 1 != 64
        assert torch.equal(same, table)
        assert torch.equal(places, torch.arange(number, int(end)))

        changed = count + 1
        for ask in (lambda: count > 40, lambda: changed.add_(200) > 130):
            with (
                NothingFromTheHost([count], most=64),
                NoWaiting("cpu"),
                pytest.raises(RuntimeError, match="makes the host wait"),
            ):
                changed = count + 1
                bool(ask())  # of what differs among the counts that fit, or is not known


WAITS = {
    "a number": lambda x: x.sum().item(),
    "a condition": lambda x: bool((x > 0).all()),
    "places": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "writing by a mask": lambda x: x.__setitem__(x > 9, x[x > 9]),
    "equality": lambda x: torch.equal(x, x),
    "a copy there": lambda x: x.to("meta"),
    "repeats": lambda x: x[0].repeat_interleave(x[0].long()),
}
WAITS_NOT = {
    "a product": lambda x: x @ x.t(),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
    "ids": lambda x: x[torch.tensor([0, 1])],
    "another dtype": lambda x: x.half(),
    "a slice": lambda x: x[:, 1:].clone(),
    "filling": lambda x: x.clone().copy_(x),
    "a number of repeats": lambda x: x.repeat_interleave(2, 1),
    "a linear": lambda x: torch.nn.functional.linear(x, x, x[0, :2]),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("what", [*WAITS, *WAITS_NOT])
def test_what_makes_the_host_wait_is_found(what, inference):
    """The CPU stands for the GPU: what the mode looks at are operators and devices, by name."""
    x, do = torch.arange(6.0).view(2, 3), (WAITS | WAITS_NOT)[what]
    with torch.inference_mode(inference):
        if what in WAITS:
            with pytest.raises(RuntimeError, match="host wait"), NoWaiting("cpu"):
                do(x)
            return
        with NoWaiting("cpu"):
            found = do(x)
        assert torch.equal(found, do(x))


def test_waiting_is_forbidden_in_one_thread_alone():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as other, NoWaiting("cpu"):
        assert other.submit(lambda: torch.ones(3).sum().item()).result() == 3


STATIC = {
    "mistral": zoo.GQA | dict(sliding_window=8),
    "gemma2": zoo.GQA | dict(sliding_window=8),
    "opt": {},
    "gptj": {},
}


@pytest.mark.parametrize("family", STATIC)
def test_any_step_over_a_static_cache(family):
    """Windows narrower than the sequence, positions that count padding: what the model says of
    itself does not matter."""
    positions = dict.fromkeys(("max_position_embeddings", "n_positions"), 96)
    model = zoo.build(family, zoo.DECODERS.get(family, {}) | STATIC[family] | positions)
    if isinstance(why_not_static(model), str):
        pytest.skip(f"transformers has no static step: {why_not_static(model)}")
    static = build_static(model, 80)
    for rows, new in ((1, 40), (4, 30), (4, 9)):
        call = dict(**prompts(rows), max_new_tokens=new, do_sample=False, pad_token_id=0)
        theirs = model.generate(**call)
        assert torch.equal(generate_fused(model, static, **call), theirs)


def test_a_cache_that_forgets_what_the_mask_shows():
    """Moshi's window is its cache's alone: the steps after a long prompt see less than the prompt
    did, which no fused block does. A cache that the window does not reach is fused."""
    if not hasattr(modeling_moshi, "ALL_ATTENTION_FUNCTIONS"):
        pytest.skip("transformers has no Moshi whose attention can be replaced")
    sizes = dict(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4)
    more = dict(sliding_window=16, vocab_size=64, max_position_embeddings=96, pad_token_id=0)
    config = transformers.MoshiConfig(**sizes, **more, audio_vocab_size=32)
    torch.manual_seed(0)
    model = transformers.MoshiForCausalLM(config).float().eval()
    if not any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=config).layers):
        pytest.skip("transformers has no window in Moshi's cache")
    for build in (build_decoder, build_static):
        with pytest.raises(NotFusable, match="cache forgets tokens that the mask shows"):
            build(model, 64)
    assert build_decoder(model, 16).max_seq_len == 16


def test_states_change_in_place_and_begin_anew():
    """Mixers with states beside attention, over a static cache; a second request knows nothing of
    the first."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, vocab_size=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, block_auto_adjust_ff_dim=False)
    kinds = dict(layer_types=["conv", "full_attention"] * 2, max_position_embeddings=96)
    torch.manual_seed(0)
    if not hasattr(transformers, "Lfm2Config"):
        pytest.skip("transformers has no lfm2")
    config = transformers.Lfm2Config(**sizes, **heads, **kinds, pad_token_id=0)
    model = transformers.Lfm2ForCausalLM(config).float().eval()
    if isinstance(why_not_static(model), str):
        pytest.skip(f"transformers has no static step: {why_not_static(model)}")
    static = build_static(model, 80)
    for rows, new in ((4, 20), (4, 12), (1, 9), (4, 20)):
        call = dict(**prompts(rows), max_new_tokens=new, do_sample=False, pad_token_id=0)
        theirs = model.generate(**call)
        assert torch.equal(generate_fused(model, static, **call), theirs)
    assert static.states()


def test_states_that_modules_keep_stay_in_the_same_memory():
    """A CUDA graph reads and writes fixed places; RecurrentGemma makes new tensors in every step,
    and keeps them in its modules."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, vocab_size=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, lru_width=32, head_dim=8)
    torch.manual_seed(0)
    config = transformers.RecurrentGemmaConfig(
        **sizes, **heads, attention_window_size=16, pad_token_id=0
    )
    model = transformers.RecurrentGemmaForCausalLM(config).float().eval()
    if isinstance(why_not_static(model), str):
        pytest.skip(f"transformers has no static step: {why_not_static(model)}")
    static = build_static(model, 80)
    for rows, new in ((4, 12), (1, 9), (4, 12)):
        call = dict(**prompts(rows), max_new_tokens=new, do_sample=False, pad_token_id=0)
        theirs = model.generate(**call)
        assert torch.equal(generate_fused(model, static, **call), theirs)
        kept = [(state.data_ptr(), state.clone()) for state in static.states()]
        assert kept
        static.step(torch.full((rows,), 5), torch.full((rows,), 40, dtype=torch.int32), 40)
        for (place, before), state in zip(kept, static.states(), strict=True):
            assert state.data_ptr() == place and not torch.equal(state, before)


def test_step_over_a_static_cache_is_refused_where_it_cannot_be():
    if isinstance(why_not_static(zoo.tiny_model("llama")), str):
        pytest.skip("transformers has no static cache that counts on the device")
    llama = zoo.tiny_model("llama")
    plain = llama.lm_head.forward
    # as if it attended to what is not there
    llama.lm_head.forward = lambda x: plain(x) * (1 + (x.shape[1] == 1))
    with pytest.raises(NotFusable, match="differ"):
        build_static(llama, 64)


def test_returned_dictionary(llama):
    kwargs = dict(
        **prompts(),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    theirs, ours = both(llama, wrapped(llama), **kwargs)
    assert (
        torch.equal(ours.sequences, theirs.sequences) and len(ours.scores) == len(ours.logits) == 6
    )
    for a, b in zip((*ours.scores, *ours.logits), (*theirs.scores, *theirs.logits)):
        assert torch.allclose(a, b, atol=1e-5)


def test_generator_is_the_source_of_random_numbers(llama):
    def sample(seed):
        return wrapper.generate(
            **prompts(),
            max_new_tokens=12,
            do_sample=True,
            generator=torch.Generator().manual_seed(seed),
        )

    wrapper = wrapped(llama)
    assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))
    with pytest.raises(ConfigError, match="generator"):
        wrapper.generate(**prompts(), max_new_tokens=3, num_beams=2, generator=torch.Generator())


def test_what_transformers_prepares_for_its_own_loop_is_no_obstacle(llama):
    """Releases hand their loop other keyword arguments (`cache` since 5.24); none of them is the
    caller's wish."""

    class Later(type(llama)):
        def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            model_kwargs["of_a_later_release"] = object()

    wrapper = wrapped(llama)
    expected = wrapper.generate(**prompts(), max_new_tokens=6, do_sample=False, pad_token_id=0)
    llama.__class__ = Later
    assert torch.equal(
        wrapper.generate(**prompts(), max_new_tokens=6, do_sample=False, pad_token_id=0), expected
    )
    assert wrapper.fusion.state == "fused"


def test_inputs_that_only_the_models_forward_knows_go_there(llama):
    wrapper = wrapped(llama)
    with pytest.raises(ValueError, match="no_such_input"):  # transformers' own words about it
        wrapper.generate(**prompts(), max_new_tokens=3, no_such_input=torch.ones(4))


class Until(StoppingCriteria):
    """Stops each row at the first token that three divides."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 3 == 0


def test_stopping_criteria(llama):
    theirs, ours = both(
        llama,
        wrapped(llama),
        **prompts(1),
        max_new_tokens=30,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([Until()]),
    )
    assert torch.equal(ours, theirs) and ours.shape[1] < 39


class Log(BaseStreamer):
    def __init__(self, limit=None):
        self.seen, self.ended, self.limit = [], False, limit

    def put(self, value):
        self.seen.append(value.flatten().tolist())
        if self.limit is not None and len(self.seen) > self.limit:
            raise KeyboardInterrupt

    def end(self):
        self.ended = True


def test_streamer_gets_tokens_one_by_one(llama):
    log, prompt = Log(), zoo.token_batch(1, 5)
    out = wrapped(llama).generate(**prompt, max_new_tokens=7, do_sample=False, streamer=log)
    assert (
        log.seen == [prompt["input_ids"][0].tolist(), *([t] for t in out[0, 5:].tolist())]
        and log.ended
    )


def test_interrupted_call_leaves_no_trace(llama):
    wrapper, kwargs = wrapped(llama), dict(max_new_tokens=9, do_sample=False, pad_token_id=0)
    before = wrapper.generate(**prompts(), **kwargs)
    with pytest.raises(KeyboardInterrupt):
        wrapper.generate(**zoo.token_batch(1, 12), **kwargs, streamer=Log(4))
    assert torch.equal(wrapper.generate(**prompts(), **kwargs), before)


def test_calls_know_nothing_of_each_other(llama):
    wrapper, fresh = wrapped(llama), {}
    for turn in range(40):
        rows, length, new = 1 + turn % 5, 1 + 7 * turn % 23, 1 + turn % 11
        key = (rows, length, new)
        ids = torch.randint(
            3, 63, (rows, length), generator=torch.Generator().manual_seed(sum(key))
        )
        kwargs = dict(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        if key not in fresh:
            fresh[key] = wrapped(llama).generate(**kwargs)
        assert torch.equal(wrapper.generate(**kwargs), fresh[key])


def test_prompts_in_pieces(llama, monkeypatch):
    whole = wrapped(llama).generate(
        **prompts(4, 31), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    monkeypatch.setattr(body, "_PROMPT_TOKENS", 4 * 7)
    pieces = wrapped(llama).generate(
        **prompts(4, 31), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    assert torch.equal(whole, pieces)


def test_more_tokens_than_the_cache_holds(llama):
    wrapper = wrapped(llama, 16)
    with pytest.raises(ConfigError, match="max_seq_len=16"):
        wrapper.generate(**zoo.token_batch(1, 9), max_new_tokens=9)
    assert wrapper.generate(**zoo.token_batch(1, 9), max_new_tokens=7, min_new_tokens=7).shape == (
        1,
        16,
    )
    with pytest.raises(ConfigError, match="empty"):
        empty = zoo.token_batch(2, 4)
        empty["attention_mask"][1] = 0
        wrapper.generate(**empty, max_new_tokens=2)


ROWS = torch.arange(4, 12).view(2, 4)
UNCLEAR = {
    "mask with NaN": (dict(attention_mask=torch.full((2, 4), float("nan"))), "0 and 1"),
    "mask of other numbers": (dict(attention_mask=torch.full((2, 4), 3)), "0 and 1"),
    "mask to be added": (dict(attention_mask=torch.full((2, 4), -1e9)), "0 and 1"),
    "mask without numbers": (dict(attention_mask=torch.ones(2, 4, device="meta")), "numbers"),
    "ids without numbers": (dict(input_ids=ROWS.to("meta")), "meta device"),
    "sparse ids": (dict(input_ids=ROWS.to_sparse()), "sparse"),
    "padding beyond the table": (dict(pad_token_id=10**6), "pad_token_id is 1000000"),
    "padding below it": (dict(pad_token_id=-1), "pad_token_id is -1"),
}


@pytest.mark.parametrize("kind", UNCLEAR)
def test_requests_that_no_kernel_may_see(llama, kind):
    changes, words = UNCLEAR[kind]
    wrapper = wrapped(llama, 16)
    with pytest.raises(ConfigError, match=words):
        wrapper.generate(**{"input_ids": ROWS, "max_new_tokens": 2, **changes})


def test_one_row_never_needs_padding(llama):
    """Older Llamas name -1."""
    found = [
        wrapped(llama, 16).generate(ROWS[:1], max_new_tokens=4, do_sample=False, pad_token_id=pad)
        for pad in (-1, 0)
    ]
    assert torch.equal(*found)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A quantized tiny model whose attention has biases, with grouped heads."""
    model = AutoAWQForCausalLM.from_pretrained(_dense(tmp_path_factory.mktemp("dense")))
    ids = [
        torch.randint(3, 63, (24,), generator=torch.Generator().manual_seed(i)) for i in range(8)
    ]
    model.quantize(
        ids,
        quant_config={"q_group_size": 32, "w_bit": 4, "version": "GEMM", "zero_point": True},
        preset="fast",
    )
    path = tmp_path_factory.mktemp("quantized") / "model"
    model.save_quantized(path)
    return path


def _dense(path):
    zoo.build(
        "qwen2", dict(num_key_value_heads=2, hidden_size=64, intermediate_size=96)
    ).save_pretrained(path)
    return str(path)


def test_quantized_model(saved, tmp_path):
    plain, fused = (
        AutoAWQForCausalLM.from_quantized(saved, fuse_layers=f, device="cpu", max_seq_len=64)
        for f in (False, True)
    )
    kwargs = dict(**prompts(), max_new_tokens=30, do_sample=False, pad_token_id=0)
    expected = plain.generate(**kwargs)
    assert torch.equal(fused.generate(**kwargs), expected)
    assert plain.fusion.state == "off" and fused.fusion.state == "fused"
    products = [m for m in fused.model.modules() if isinstance(m, WQLinear)]
    assert len(products) == 3 * 4  # q, k, v and gate, up are one each
    theirs, ours = plain.model.state_dict(), fused.model.state_dict()
    assert theirs.keys() == ours.keys() and all(
        torch.equal(theirs[name], ours[name]) for name in theirs
    )
    with torch.no_grad():
        assert torch.allclose(fused(**prompts()).logits, plain(**prompts()).logits, atol=1e-5)
    assert torch.equal(fused.generate(**kwargs, num_beams=1), expected)
    fused.save_quantized(tmp_path / "again")  # parts the siblings
    first, second = (Path(p, "model.safetensors").read_bytes() for p in (saved, tmp_path / "again"))
    assert first == second
    assert torch.equal(fused.generate(**kwargs), expected)


def test_gate_and_up_in_turn(saved, monkeypatch):
    """As they are joined for a GPU: the same tokens, the same bytes saved."""
    plain, fused = (
        AutoAWQForCausalLM.from_quantized(saved, fuse_layers=f, device="cpu", max_seq_len=64)
        for f in (False, True)
    )
    monkeypatch.setattr("awq.generate.run.operations.gate_interleave", lambda linear: 16)
    kwargs = dict(**prompts(), max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert torch.equal(fused.generate(**kwargs), plain.generate(**kwargs))
    assert [block.mlp.interleave for block in fused.fuse().body.blocks] == [16] * len(
        fused.fuse().body.blocks
    )
    theirs, ours = plain.model.state_dict(), fused.model.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    with torch.no_grad():
        assert torch.allclose(fused(**prompts()).logits, plain(**prompts()).logits, atol=1e-5)


def test_a_fused_model_that_is_cast(saved):
    """It is fused anew; what the joined weights hold is not lost."""
    plain, fused = (
        AutoAWQForCausalLM.from_quantized(
            saved, fuse_layers=f, device="cpu", torch_dtype=torch.float32
        )
        for f in (False, True)
    )
    kwargs = dict(**prompts(), max_new_tokens=6, do_sample=False, pad_token_id=0)
    fused.generate(**kwargs)
    fused.to(torch.bfloat16).generate(**kwargs)
    assert fused.fusion.state == "fused" and fused.fuse().dtype == torch.bfloat16
    expected = plain.to(torch.bfloat16).to(torch.float32).generate(**kwargs)
    assert torch.equal(fused.to(torch.float32).generate(**kwargs), expected)


def test_calls_from_several_threads(llama):
    from concurrent.futures import ThreadPoolExecutor

    wrapper, kwargs = wrapped(llama), dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    batches = [zoo.token_batch(1 + i % 3, 4 + i, seed=i) for i in range(8)]
    alone = [wrapper.generate(**batch, **kwargs) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: wrapper.generate(**batch, **kwargs), batches))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


def test_chat_through_a_text_streamer(saved, capsys):
    class Tokenizer:
        def decode(self, ids, **kwargs):
            return " ".join(map(str, ids)) + " "

    model = AutoAWQForCausalLM.from_quantized(saved, fuse_layers=True, device="cpu")
    out = model.generate(
        **zoo.token_batch(1, 4),
        max_new_tokens=8,
        do_sample=False,
        streamer=TextStreamer(Tokenizer(), skip_prompt=True),
    )
    assert capsys.readouterr().out.split() == [str(t) for t in out[0, 4:].tolist()]


def test_kernels_equal_plain_operators():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [sys.executable, HERE / "decoding_cases.py"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors = json.loads(done.stdout)
    assert len(errors) == 43 and all(error < 2e-6 for error in errors.values()), errors


def compiled(target, kernel, dtype, **constants):
    """A decode kernel's machine code for a GPU that is not there."""
    import offline

    from awq.kernels.triton import attending, decoding, heads

    pointers = {
        "qkv": dtype,
        "x": dtype,
        "branch": dtype,
        "total": dtype,
        "y": dtype,
        "h": dtype,
        "q": dtype,
        "out": dtype,
        "k_cache": dtype,
        "v_cache": dtype,
        "lengths": "i32",
        "arrived": "i32",
    }
    numbers = dict.fromkeys(("factor", "eps", "scaling", "softcap", "q_eps", "k_eps"), "fp32")
    numbers |= dict.fromkeys(("tokens", "start", "positions"), "i32")
    homes = {"attend_kernel": attending, "split_kernel": heads}
    function = getattr(homes.get(kernel, decoding), kernel)
    pdl = offline.starts_early(target)
    constants = {
        n: (constants | {"PDL": pdl})[n] for n in function.arg_names if n in constants or n == "PDL"
    }
    arguments = {
        n: numbers.get(n) or f"*{pointers.get(n, 'fp32')}"
        for n in function.arg_names
        if n not in constants
    }
    return offline.compile_kernel(
        function,
        target,
        arguments,
        constants,
        {"num_warps": 4} | ({"launch_pdl": True} if pdl else {}),
    )


HEADS = dict(HEADS=32, KV_HEADS=8, DIM=128, D=128, R=64, NORMED=True, MEAN=False)
KERNELS = {
    "add_norm_kernel": dict(
        WIDTH=4096, BLOCK=4096, PARTS=8, NORM=True, MEAN=True, HAS_WEIGHT=True, HAS_BIAS=True
    ),
    "activate_kernel": dict(WIDTH=14336, BLOCK=512, NAME="silu", GATED=True, INTERLEAVE=16),
    "split_kernel": HEADS | dict(HEADS2=32, KV2=8),
    "attend_kernel": HEADS
    | dict(
        G=16, GP=4, SPLIT=64, TOGETHER=8, BLOCK=64, LEAST=256, LINES=2, WINDOW=4096, CAPPED=True
    ),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "target, dtype", [(80, "fp16"), (90, "bf16"), (100, "fp16"), ("gfx942", "bf16")]
)
def test_kernels_compile_without_spilling(kernel, target, dtype):
    assert compiled(target, kernel, dtype, **KERNELS[kernel]).spilled == 0


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu", "relu2"])
def test_activations_compile(name):
    assert (
        compiled(
            90,
            "activate_kernel",
            "fp16",
            WIDTH=700,
            BLOCK=512,
            NAME=name,
            GATED=False,
            INTERLEAVE=0,
        ).spilled
        == 0
    )
