"""Models of every kind: towers beside a language model, encoder-decoders, state-space models."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from awq import AutoAWQForCausalLM, AwqConfig, QuantizeOptions, quantize_model
from awq.calibration import CalibrationBatch
from awq.checkpoint.match import all_current_keys, as_saved
from awq.errors import ModelError
from awq.folds import apply_fold
from awq.folds.find import find_folds
from awq.models.base import BaseAWQForCausalLM
from awq.nn.blocks import find_block_lists
from awq.nn.decoder_inputs import with_decoder_inputs
from awq.nn.hooks import hooked
from awq.nn.linear import WQLinear
from awq.nn.reached import reached_lists
from awq.nn.walk import BlockWalk

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

TEXT = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=64,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
TOWER = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=16,
    patch_size=8,
)
CONFIG = AwqConfig(group_size=16)


def inputs(rows=4, length=12, seed=0, padded=True):
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def batches(**kwargs):
    return [CalibrationBatch(*inputs(24, 16, **kwargs).values())]


def built(config):
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])(config).float().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif "embed" not in name and "shared" not in name:
            parameter.data *= 4
    return model


def vision_language(kind):
    if kind == "llava":
        config = transformers.LlavaConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config={"model_type": "clip_vision_model", **TOWER},
            image_token_index=63,
        )
        config.architectures = ["LlavaForConditionalGeneration"]
    elif kind == "gemma3":
        config = transformers.Gemma3Config(
            text_config=TEXT, vision_config=TOWER, mm_tokens_per_image=4, image_token_index=63
        )
        config.architectures = ["Gemma3ForConditionalGeneration"]
    else:
        if not hasattr(transformers, "Qwen2_5_VLTextConfig"):
            pytest.skip("transformers has no settings of the text part of qwen2_5_vl")
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        today = hasattr(transformers.LlamaConfig(), "rope_parameters")
        vision = dict(
            depth=2,
            hidden_size=32,
            intermediate_size=64,
            num_heads=4,
            patch_size=14,
            out_hidden_size=32,
            window_size=56,
            fullatt_block_indexes=[1],
        )
        config = transformers.Qwen2_5_VLConfig(
            text_config=TEXT | {"rope_parameters" if today else "rope_scaling": rope},
            vision_config=vision,
            image_token_id=60,
            video_token_id=61,
            vision_start_token_id=62,
            vision_end_token_id=63,
        )
        config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return built(config)


def encoder_decoder(kind):
    sizes = dict(
        d_model=32,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    if kind == "t5":
        config = transformers.T5Config(
            **sizes, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
        )
        config.architectures = ["T5ForConditionalGeneration"]
    else:
        config = transformers.BartConfig(
            **sizes,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=64,
        )
        config.architectures = ["BartForConditionalGeneration"]
    return built(config)


def saved_and_loaded(model, tmp_path, preset="fast"):
    """(wrapper that was quantized, the same from disk)."""
    model.save_pretrained(tmp_path / "dense")
    wrapper = AutoAWQForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(wrapper.model) is type(model)
    wrapper.quantize(inputs(24, 16), quant_config={"q_group_size": 16}, preset=preset)
    wrapper.save_quantized(tmp_path / "quantized")
    return wrapper, AutoAWQForCausalLM.from_quantized(tmp_path / "quantized", device="cpu")


@pytest.mark.parametrize("kind", ["llava", "gemma3", "qwen2_5_vl"])
def test_towers_stay_dense_and_are_named(kind, tmp_path):
    wrapper, loaded = saved_and_loaded(vision_language(kind), tmp_path)
    report = wrapper.report
    assert len(report.linears) == 2 * 7 and all(
        "language_model" in line.name for line in report.linears
    )
    assert all(line.loss <= line.loss_rtn * 1.001 for line in report.linears)
    towers = [
        name
        for name, reason in report.skipped.items()
        if reason.startswith("the calibration inputs do not reach")
    ]
    settings = json.loads((tmp_path / "quantized" / "config.json").read_text())[
        "quantization_config"
    ]
    assert towers and set(towers) <= set(settings["modules_to_not_convert"])
    assert torch.equal(loaded.model(**inputs()).logits, wrapper.model(**inputs()).logits)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_both_stacks_of_encoder_decoders_are_quantized(kind, tmp_path):
    model = encoder_decoder(kind)
    linears = {
        line
        for line, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in line
    }
    wrapper, loaded = saved_and_loaded(model, tmp_path, "balanced")
    assert {line.name for line in wrapper.report.linears} == linears
    assert all(line.loss <= line.loss_rtn * 1.001 for line in wrapper.report.linears)
    item = with_decoder_inputs(model, inputs())
    assert torch.equal(loaded.model(**item).logits, wrapper.model(**item).logits)
    generated = loaded.generate(**inputs(padded=False), max_new_tokens=4, do_sample=False)
    assert torch.equal(
        generated, wrapper.model.generate(**inputs(padded=False), max_new_tokens=4, do_sample=False)
    )


@torch.no_grad()
def test_a_decoders_blocks_read_what_the_encoder_gives():
    """One block at a time, the decoder computes what the model computes: cross-attention reads the
    encoder's true output."""
    model = encoder_decoder("bart")
    item = with_decoder_inputs(model, inputs())
    lists = reached_lists(model, list(reversed(find_block_lists(model))), item)
    assert [name for name, _ in lists] == ["model.encoder.layers", "model.decoder.layers"]
    for visit in BlockWalk(model, lists, [inputs()], calibration=True):
        visit.advance()
    expected = model.model(**item).last_hidden_state
    real = item["decoder_attention_mask"].bool()
    torch.testing.assert_close(
        visit.calibration.hidden[0][real], expected[real], rtol=1e-5, atol=1e-5
    )


def test_padding_of_either_side_never_enters_a_statistic():
    reports = []
    for fill in (5, 40):
        item = inputs(24, 16)
        item["input_ids"][item["attention_mask"] == 0] = fill
        batch = CalibrationBatch(item["input_ids"], item["attention_mask"])
        reports.append(
            quantize_model(encoder_decoder("bart"), [batch], CONFIG, QuantizeOptions(preset="fast"))
        )
    assert [line.loss for line in reports[0].linears] == pytest.approx(
        [line.loss for line in reports[1].linears], rel=1e-4
    )


def test_decoder_inputs():
    model = encoder_decoder("t5")
    item = with_decoder_inputs(model, inputs())
    assert (
        item["decoder_input_ids"].shape == (4, 11) and (item["decoder_input_ids"][:, 0] == 1).all()
    )
    assert torch.equal(item["decoder_input_ids"][:, 1:], inputs()["input_ids"][:, :10])
    given = inputs() | {"decoder_input_ids": torch.ones(4, 3, dtype=torch.long)}
    assert with_decoder_inputs(model, given) is given
    single = {name: tensor[:, :1] for name, tensor in inputs().items()}
    assert torch.equal(with_decoder_inputs(model, single)["decoder_input_ids"], single["input_ids"])


def test_a_model_that_text_does_not_reach():
    model = vision_language("llava")
    with pytest.raises(ModelError, match="left to quantize"):
        quantize_model(
            model,
            batches(),
            AwqConfig(group_size=16, modules_to_not_convert=["language_model"]),
            QuantizeOptions(),
        )


def test_state_space_models(tmp_path):
    config = transformers.FalconMambaConfig(
        hidden_size=32,
        state_size=8,
        num_hidden_layers=2,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.architectures = ["FalconMambaForCausalLM"]
    wrapper, loaded = saved_and_loaded(built(config), tmp_path)
    assert {line.name.rpartition(".")[2] for line in wrapper.report.linears} >= {
        "in_proj",
        "out_proj",
    }
    assert "backbone.layers.0.mixer.dt_proj" in wrapper.report.skipped
    assert torch.equal(loaded.model(**inputs()).logits, wrapper.model(**inputs()).logits)


def test_a_block_that_runs_in_two_places_is_stored_once(tmp_path):
    if not hasattr(transformers.PreTrainedModel, "get_expanded_tied_weights_keys"):
        pytest.skip("transformers has no list of the weights that are tied (before 5)")
    layers = ["mamba", "hybrid", "mamba", "hybrid"]
    config = transformers.ZambaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        attention_head_dim=16,
        vocab_size=64,
        num_key_value_heads=4,
        n_mamba_heads=2,
        mamba_d_state=8,
        mamba_dt_rank=16,
        layers_block_type=layers,
        attn_layer_period=2,
        attn_layer_offset=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_mamba_kernels=False,
    )
    config.architectures = ["ZambaForCausalLM"]
    wrapper, loaded = saved_and_loaded(built(config), tmp_path)
    dense, packed = (
        set(load_file(tmp_path / kind / "model.safetensors")) for kind in ("dense", "quantized")
    )
    assert {
        name.replace(".qweight", ".weight")
        for name in packed
        if not name.endswith((".qzeros", ".scales"))
    } == dense
    first, second = (
        loaded.model.model.layers[i].shared_transf.feed_forward.up_proj for i in (1, 3)
    )
    assert first is second and type(first) is WQLinear
    assert torch.equal(loaded.model(**inputs()).logits, wrapper.model(**inputs()).logits)
    loaded.save_quantized(tmp_path / "again")
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "quantized" / "model.safetensors").read_bytes()


def stored_otherwise(kind):
    """Types whose checkpoints hold several of the model's linears as one tensor, or one as
    several."""
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    ids = dict(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if kind == "jina_embeddings_v3":
        config = transformers.AutoConfig.for_model(kind, **small, **ids, max_position_embeddings=64)
        config.architectures = ["JinaEmbeddingsV3Model"]
    else:
        config = transformers.AutoConfig.for_model(kind, **small, **ids, num_key_value_heads=2)
        config.architectures = ["Molmo2TextModel"]
    return built(config)


@pytest.mark.parametrize("kind", ["jina_embeddings_v3", "molmo2_text"])
def test_packed_linears_are_cut_as_in_the_source(kind, tmp_path):
    """One Wqkv with its bias; and queries, keys and values of unequal numbers of heads."""
    pytest.importorskip(
        f"transformers.models.{kind.removesuffix('_text')}", reason=f"transformers has no {kind}"
    )
    model = stored_otherwise(kind)
    wrapper, loaded = saved_and_loaded(model, tmp_path)
    dense, packed = (
        set(load_file(tmp_path / part / "model.safetensors")) for part in ("dense", "quantized")
    )
    parts = (".qzeros", ".scales")
    stored = {name.replace(".qweight", ".weight") for name in packed if not name.endswith(parts)}
    assert {name.removesuffix(".weight") for name in stored} == {
        name.removesuffix(".weight") for name in dense
    }
    layer = {line.name.rpartition(".")[2] for line in wrapper.report.linears}
    assert {"q_proj", "k_proj", "v_proj"} <= layer
    for line in wrapper.report.linears:
        ours, theirs = (m.model.get_submodule(line.name) for m in (wrapper, loaded))
        assert torch.equal(ours.quantized().codes, theirs.quantized().codes)
        assert (ours.bias is None) == (theirs.bias is None)
        assert ours.bias is None or torch.equal(ours.bias, theirs.bias)
    loaded.save_quantized(tmp_path / "again")
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "quantized" / "model.safetensors").read_bytes()


def not_a_chain(kind):
    """XLM has two lists whose blocks take turns; LiLT hands a second stream from block to block;
    Funnel pools between its lists."""
    ids = dict(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if kind == "xlm":
        config = transformers.XLMConfig(
            **ids, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=64, n_langs=1
        )
        config.architectures = ["XLMModel"]
    elif kind == "lilt":
        config = transformers.LiltConfig(
            **ids,
            hidden_size=96,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            max_2d_position_embeddings=64,
        )
        config.architectures = ["LiltModel"]
    elif kind == "t5":
        config = transformers.T5Config(
            **ids, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=3, tie_word_embeddings=False
        )
        config.architectures = ["T5EncoderModel"]
    else:
        config = transformers.FunnelConfig(
            **ids,
            block_sizes=[2, 1],
            d_model=32,
            n_head=4,
            d_head=8,
            d_inner=64,
            num_decoder_layers=1,
            max_position_embeddings=64,
        )
        config.architectures = ["FunnelModel"]
    return built(config)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["xlm", "lilt", "funnel", "t5"])
def test_blocks_read_what_they_read_in_the_model(kind):
    """Also where that is not just what the block before them gives."""
    model, item = not_a_chain(kind), inputs(4, 16)
    lists = find_block_lists(model)
    names = [f"{prefix}.{i}" for prefix, blocks in lists for i in range(len(blocks))]
    expected = {}
    with hooked(model, names, before=lambda name, args: expected.setdefault(name, args)):
        model(**item)
    walk = BlockWalk(model, reached_lists(model, lists, item), [item], calibration=True)
    visited = []
    for visit in walk:
        [(call, hidden)] = visit.calls()
        visited.append(visit.name)
        given = [hidden, *call.args]
        pairs = zip(given, expected[visit.name])
        for ours, true in pairs:
            if isinstance(true, torch.Tensor) and true.is_floating_point():
                torch.testing.assert_close(ours, true)  # T5's first block makes the bias of all
        visit.advance()
    assert visited == list(expected)


@torch.no_grad()
def test_folds_keep_all_that_a_block_hands_on():
    """LiLT's blocks give a second stream, which folds proven on the first alone would break."""
    model, item = not_a_chain("lilt"), inputs(padded=False)
    expected = model(**item).last_hidden_state
    folded = 0
    for name, groups in list(find_folds(model)):
        for group in groups:
            if group.fold is not None:
                scale = torch.rand(group.in_features) * 1.5 + 0.5
                apply_fold(model.get_submodule(name), group.fold, group.fold.tie(scale))
                folded += 1
    assert folded
    torch.testing.assert_close(model(**item).last_hidden_state, expected, rtol=1e-3, atol=1e-4)


def test_models_whose_initialisation_asks_for_weights_are_loaded(tmp_path):
    """Funnel's asks for the shape of every linear's weight."""
    wrapper, loaded = saved_and_loaded(not_a_chain("funnel"), tmp_path)
    expected = wrapper.model(**inputs()).last_hidden_state
    assert torch.equal(loaded.model(**inputs()).last_hidden_state, expected)


def test_a_model_that_changes_its_own_weights_is_refused():
    """RWKV halves weights when it first runs: packed ones cannot be, and a saved file would be
    halved again."""
    sizes = dict(hidden_size=32, attention_hidden_size=32, intermediate_size=64)
    config = transformers.RwkvConfig(
        **sizes, vocab_size=64, context_length=64, num_hidden_layers=2, rescale_every=1
    )
    config.architectures = ["RwkvForCausalLM"]
    wrapper = BaseAWQForCausalLM(built(config), "rwkv")
    with pytest.raises(ModelError, match="changes its own weights in its forward"):
        wrapper.quantize(inputs(), quant_config=CONFIG)


def test_weights_that_no_file_can_hold_packed_stay_dense(tmp_path):
    """The source has a bare tensor in their place; saved packed they would not be found again."""
    pytest.importorskip("transformers.models.inkling2", reason="transformers has no inkling2")
    from tiny_kinds import all_kinds
    from zoo_checks import check

    kind = next(kind for kind in all_kinds() if str(kind) == "inkling2_text:causal")
    result = check(kind, tmp_path, preset="fast", rows=4)
    assert any("bare tensor" in reason for reason in result.left)
    assert not result.failed(), result.to_dict()


def test_one_tensor_of_the_files_that_becomes_several_is_no_lack():
    """The corrections of Ernie's two routers lie in one tensor; a tensor that is truly missing is
    told."""
    pytest.importorskip("transformers.models.ernie4_5_vl_moe", reason="transformers has no type")
    from tiny_kinds import all_kinds, build

    kind = next(kind for kind in all_kinds() if str(kind) == "ernie4_5_vl_moe:vlm")
    try:
        model = build(kind)
    except TypeError:
        pytest.skip("transformers has no ernie4_5_vl_moe that can be built (5.0)")
    stored = set(as_saved(model, model.state_dict()))
    assert set(model.state_dict()) <= all_current_keys(model, stored)
    lost = {name for name in stored if "e_score_correction_bias" not in name}
    left = set(model.state_dict()) - all_current_keys(model, lost)
    assert left and all("e_score_correction_bias" in name for name in left)
