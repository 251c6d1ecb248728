"""Steps that a GPU captures of models that are not fused, here without capture: equal tokens, in
fixed places of memory."""

import pytest
import torch
import transformers
import zoo

from awq.generate import NotFusable, build_static
from awq.generate.prove_static import why_not_static
from awq.generate.run.loop import generate_fused, why_not
from awq.generate.run.no_cache import WholeDecoder
from awq.generate.run.own_cache import OwnCacheDecoder
from awq.generate.run.static import counts_of, static_cache
from awq.models.base import BaseAWQForCausalLM
from awq.nn.capture import NothingFromTheHost, NoWaiting

SIZES = dict(hidden_size=32, num_hidden_layers=3, vocab_size=64, pad_token_id=0)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=64)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
ATTENTION_LAST = ["linear_attention", "linear_attention", "full_attention"]
OWN = {
    "MiniMax": SIZES | HEADS | EXPERTS | dict(layer_types=ATTENTION_LAST, block_size=8),
    "xLSTM": SIZES
    | dict(hidden_size=64, num_heads=4, num_blocks=3, chunk_size=16, qk_dim_factor=1.0),
}


def needs_counts_on_the_device():
    reason = why_not_static(zoo.tiny_model("llama"))
    if reason is not None:
        pytest.skip(f"transformers has no static step: {reason}")


def tiny(name, settings):
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers has no {name}")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name}ForCausalLM")(config).float().eval()


def prompts(rows, length=9):
    batch = zoo.token_batch(rows, length)
    for row, padding in enumerate((0, 3, length - 1, 1)[:rows]):
        batch["attention_mask"][row, :padding] = 0
        batch["input_ids"][row, :padding] = 0
    return batch


def call(rows, new, length=9):
    settings = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    return prompts(rows, length) | settings


@pytest.mark.parametrize("name", OWN)
def test_a_cache_of_the_models_own(name):
    """Its tensors stay where they are, whichever request comes: short after long, other rows."""
    needs_counts_on_the_device()
    model = tiny(name, OWN[name])
    decoder = build_static(model, 80)
    assert isinstance(decoder, OwnCacheDecoder)
    for rows, new, length in ((1, 20, 9), (1, 9, 5), (1, 40, 30), (2, 9, 6), (2, 12, 9)):
        given = call(rows, new, length)
        if rows == 2:  # of one length: not every loop of transformers takes padding out
            given["attention_mask"][:] = 1
        theirs = model.generate(**given)
        assert torch.equal(generate_fused(model, decoder, **given), theirs)

        places = [state.data_ptr() for state in decoder.states()]
        ids, lengths = torch.full((rows,), 5), torch.full((rows,), 50, dtype=torch.int32)
        before = [state.clone() for state in decoder.states()]
        with torch.inference_mode(), NoWaiting("cpu"):
            decoder.eager_step(ids, lengths, 50)
        assert places and places == [state.data_ptr() for state in decoder.states()]
        assert any(not torch.equal(a, b) for a, b in zip(before, decoder.states()))


def test_a_cache_of_the_models_own_that_grows_is_refused():
    needs_counts_on_the_device()
    model = tiny("xLSTM", OWN["xLSTM"])
    plain = model.forward

    def grows(input_ids=None, cache=None, use_cache=None, **kwargs):
        out = plain(input_ids=input_ids, cache=cache, use_cache=use_cache, **kwargs)
        if out.get("cache") is not None:
            kept = getattr(out.cache, "kept", input_ids[:, :0])
            out.cache.kept = torch.cat([kept, input_ids], 1)
        return out

    model.forward = grows
    with pytest.raises(NotFusable):
        build_static(model, 64)


def test_a_model_without_a_cache_reads_all_tokens_in_every_step():
    sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=160, vocab_size=64)
    torch.manual_seed(0)
    model = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**sizes)).eval()
    decoder = build_static(model, 160)
    assert isinstance(decoder, WholeDecoder)
    for rows, new, length in ((3, 20, 9), (3, 70, 9), (1, 120, 30), (3, 9, 60)):
        theirs = model.generate(**call(rows, new, length))
        assert torch.equal(generate_fused(model, decoder, **call(rows, new, length)), theirs)
        assert decoder.states() == []  # what a capture on a GPU puts back
    # a step looks at as many columns as there may be tokens, in powers of two
    columns = [decoder.columns_for(longest) for longest in (1, 63, 64, 127, 128, 159)]
    assert columns == [64, 64, 128, 128, 160, 160]


def test_no_cache_in_a_models_files_is_no_wish_of_a_call():
    """MPT's files say use_cache=False."""
    model = zoo.tiny_model("llama")
    model.generation_config.use_cache = False
    assert why_not(model, dict(max_new_tokens=4)) is None
    for given in (True, None):
        assert why_not(model, dict(max_new_tokens=4, use_cache=given)) is None
    assert why_not(model, dict(max_new_tokens=4, use_cache=False)) == "use_cache=False"
    other = transformers.GenerationConfig(use_cache=False, pad_token_id=0)
    assert why_not(model, dict(generation_config=other)) is None

    wrapper = BaseAWQForCausalLM(model, "tiny")
    wrapper.fuse_layers(64)
    given = call(3, 12)
    fused = wrapper.generate(**given, generator=torch.Generator())  # fused, or an error
    assert torch.equal(fused, model.generate(**given))

    model.generation_config.use_cache = True
    assert why_not(model, dict(generation_config=other)) == "use_cache=False"


def test_a_count_that_was_asked_for_stays_when_tokens_are_added():
    """Inkling asks a cache for its count, adds a token, and computes positions with the answer."""
    needs_counts_on_the_device()
    llama = zoo.tiny_model("llama")
    cache = static_cache(llama.config, 32)
    with torch.no_grad():
        llama(**zoo.token_batch(1, 5), past_key_values=cache)
    keys = cache.layers[0].keys[:, :, :1]
    with NothingFromTheHost(counts_of(cache), 32), NoWaiting("cpu"):
        asked = cache.get_seq_length()
        cache.layers[0].update(keys, keys)
        assert not bool(asked + 1 > 100)  # and what is known of it is known of the copy
    assert int(asked) == 5 and int(cache.get_seq_length()) == 6
