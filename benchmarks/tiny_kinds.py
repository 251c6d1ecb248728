"""Tiny random models of every text-bearing type that the installed transformers has.

No type is built by hand. A type's default config is shrunk by the names of its fields (`SIZES`):
what is called `…hidden_size` becomes 64, a list with one entry a layer keeps every kind of layer
once. What such rules cannot know, that two fields must fit each other, is in `EXCEPTIONS`. A type
that transformers learns tomorrow is swept without a line here unless its fields must fit each other
in a new way.

`all_kinds()` lists what there is; `build(kind)` makes one. Weights have unit gain, and norms a few
outlying channels, so that activations stay in range and a wrong fold shows.
"""

from __future__ import annotations

import dataclasses
import inspect
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto as auto

VOCABULARY = 128  # ids below TEXT_IDS are text; placeholders of images and the like lie above
TEXT_IDS = 96
HIDDEN, INNER, EXPERT, HEADS, KV_HEADS, HEAD, LAYERS = 64, 96, 32, 4, 2, 16, 3
MAX_PARAMETERS = 40_000_000

# The first pattern that a field's name matches gives its size. None: as it is.
SIZES: list[tuple[str, Any]] = [
    (r"vocab_size_per_layer_input$", VOCABULARY),
    (r"^(type_vocab_size|task_type_vocab_size)$", None),
    (r"(^|_)vocab_size$|_vocab$|^num_embeds$", VOCABULARY),
    (
        r"moe_intermediate_size|expert_ffn_hidden_size|shared_experts?_intermediate_size|share_expert_dim",
        EXPERT,
    ),
    (r"moe_shared_expert_intermediate_size|shared_intermediate_size|moe_hidden_size", EXPERT),
    (r"hidden_size_per_layer_input", 32),
    (
        r"intermediate_size|intermediate_dim|ffn_dim|^d_ff$|^dff$|^dim_ff$|ffn_hidden_size|feed_forward_size",
        INNER,
    ),
    (r"^mlp_dim$|^n_inner$|^d_inner$", INNER),
    (
        r"^head_dim$|_head_dim$|^d_kv$|^d_head$|^dim_head$|^kv_channels$|attention_head_size|^resampler_dim_head$",
        HEAD,
    ),
    (r"^swa_head_dim$|mamba_d_head", HEAD),
    (r"^(q_lora_rank|kv_lora_rank|o_lora_rank)$", 32),
    (
        r"hidden_size$|hidden_size_global$|^d_model$|^n_embd$|^emb_dim$|embedding_size$|embed_dim$|^dim$|^hidden_dim$",
        HIDDEN,
    ),
    (
        r"word_embed_proj_dim|projection_dim$|^projection_hidden_dim$|^projector_(in|out)put_dim$|output_proj_dims",
        HIDDEN,
    ),
    (
        r"vision_output_dim|adapter_in_dim|adapter_out_dim|adapter_input_size|^d_latents$|decoder_dim|mm_embed_dim",
        HIDDEN,
    ),
    (r"^output_dim$|entity_emb_size|lang_embed_dim|backbone_hidden_size", HIDDEN),
    (r"^linear_num_value_heads$", 8),  # at least, as each gives a channel of its own
    (r"num_key_value_heads$|^num_kv_heads$|^kv_n_heads$|num_query_groups", "kv_heads"),
    (r"(attention_heads|num_heads|^n_heads?|^n_head|_heads)$", HEADS),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (
        r"(^|_)(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|layers)$|^depth$",
        "layers",
    ),
    (
        r"num_decoder_layers|num_encoder_layers|num_global_layers|_num_hidden_layers$|resampler_depth",
        "layers",
    ),
    (r"aligner_num_add_layers|^num_blocks$", "layers"),
    (r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$", 4),
    (r"zero_expert_num", 2),
    (r"^(num_experts_per_tok|moe_k|moe_topk|moe_top_k|top_k_experts)$", 2),
    (r"^n_group$", 2),
    (r"^topk_group$", 1),
    (r"^num_expert_groups$", 2),
    (
        r"max_position_embeddings|^n_positions$|^n_ctx$|^max_seq_len$|max_source_positions|max_target_positions",
        128,
    ),
    (
        r"original_max_position_embeddings|context_length|max_2d_position_embeddings|max_pos_emb",
        128,
    ),
    (
        r"sliding_window$|sliding_window_size|attention_window_size|local_attention_window_len|^local_attention$",
        16,
    ),
    (r"attention_chunk_size|keep_window_size", 16),
    (r"^image_size$|^resolution$", 32),
    (r"^patch_size$|^spatial_patch_size$", 8),
    (r"num_position_embeddings", 16),
    (r"index_topk$", 8),
    (r"index_topk_blocks", 2),
    (r"index_block_size", 8),
    (r"^index_kpool$", 4),
    (r"mamba_d_state|^state_size$|ssm_state_size|mamba_chunk_size|^chunk_size$", 16),
    (r"embedding_rank|laurel_rank|hc_lowrank|gated_norm_rank|adapter_rank|router_hidden_size", 32),
    (r"num_mel_bins|^feature_size$", 16),
]
TOKEN_FIELD = re.compile(r"(token_id|token_index|_token|_index|_id)$")
TOKENS: dict[str, int | None] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "unk_token_id": 3,
    "mask_token_id": 4,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
    "forced_bos_token_id": None,
}
# What `draw` chooses from, by the names of fields.
DRAWS: list[tuple[str, list[Any]]] = [
    (r"tie_word_embeddings", [True, False]),
    (r"(attention|mlp|qkv|use|use_qkv|o_proj|feed_forward)_bias|bias", [True, False]),
    (r"use_qk_norm|qk_layernorm|qk_norm|parallel_attn|use_parallel_residual", [True, False]),
    (r"num_key_value_heads", [1, 2, 4]),
    (r"intermediate_size|ffn_dim|d_ff|n_inner", [64, 96, 136, 224]),
    (r"hidden_size|d_model|n_embd", [64, 96, 128]),
    (r"head_dim", [8, 16, 24, 32]),
    (r"vocab_size", [VOCABULARY, VOCABULARY + 5, 160]),
]
LEFT_ALONE = ("architectures", "id2label", "label2id", "torch_dtype", "dtype", "problem_type")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "layers")
HEAD_COUNTS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
MAX_LAYER_KINDS = 6

# as an override: a part that the default config leaves out and every checkpoint has
TOWER = object()


# Fields that must fit each other, by model type; dots lead into the configs of parts.


def _inside(part: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {f"{part}.{key}": value for key, value in settings.items()}


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **more}


_MULTI_ROPE = {"rope_parameters": _rope(mrope_section=[2, 3, 3])}
_HALF_MULTI_ROPE = {"rope_parameters": _rope(partial_rotary_factor=0.5, mrope_section=[1, 1, 2])}
_FULL_ROPE = {"rope_parameters": {"full_attention": _rope()}}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1}
_NEMOTRON = {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1}
_BOTH_TOWERS = {"vision_config": TOWER, "audio_config": TOWER}
_SHARED_KEYS = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_GEMMA3N = _SHARED_KEYS | {
    "intermediate_size": [96] * 4,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
}
_GEMMA4_EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}
_DOTS3 = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_SPARSE_INDEX = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_CODEBOOK = _inside(
    "vq_config",
    {
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "latent_channels": 32,
        "embed_dim": 32,
    },
)
_IMAGE_WORDS = {"vocabulary_map": {"<image>": 100, "IMGIMGA": 101, "IMGIMGB": 102}}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_FOUR_STAGES = {
    "embed_dim": [32, 32, 64, 64],
    "depths": [1] * 4,
    "num_heads": [4] * 4,
    "num_groups": [4] * 4,
}
_HUNYUAN = {"head_dim": 16, "rope_parameters": _rope(mrope_section=[2, 2, 2, 2])}
_ZAMBA2_LAYERS = ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]
_TOKENIZER_STAGES = {"num_filters": 4, "depths": [1] * 7}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "bert-generation": {"is_decoder": True},  # else its tokens see those behind them
    "blenderbot": {"encoder_layers": 3},
    "chameleon": _CODEBOOK | _IMAGE_WORDS,
    "codegen": {"rotary_dim": 8},
    "cohere_compass": _inside("text_config", _FULL_ROPE),
    "cohere_compass_text": _FULL_ROPE,
    "dbrx": {
        "attn_config.rope_theta": 10000.0,
        "attn_config.kv_n_heads": 2,
        "attn_config.clip_qkv": 8.0,
        "ffn_config.moe_top_k": 2,
    },
    "deepseek_ocr2": _inside(
        "text_config", {"mlp_layer_types": ["dense", "sparse", "sparse"], "num_experts_per_tok": 2}
    ),
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "diffusion_gemma": _inside(
        "text_config", {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    ),
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "head_dim": 16,
    },
    "dots3_note": _inside("text_config", _DOTS3),
    "dots3_note_text": _DOTS3,
    "embedding_gemma2": _BOTH_TOWERS,
    "emu3": _CODEBOOK | _IMAGE_WORDS | {"vq_config.latent_channels": 4},
    "ernie4_5_vl_moe": _inside(
        "text_config",
        {
            "rope_parameters": _rope(rope_theta=500000.0, mrope_section=[3, 3, 2]),
            "moe_intermediate_size": [32, 32],
        },
    ),
    "esm": {"vocab_size": 128},
    "esmc": {"num_key_value_heads": 4, "vocab_size": 128},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 128},
    "falcon_mamba": {"time_step_rank": 32},
    "fast_vlm": {"vision_config": _SIGLIP},
    "florence2": _inside("vision_config", _FOUR_STAGES),
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "gemma3n": _inside("text_config", _GEMMA3N),
    "gemma3n_text": _GEMMA3N,
    "gemma4": _BOTH_TOWERS,
    "gemma4_unified": _BOTH_TOWERS,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "gptj": {"rotary_dim": 8},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [0, 1, 1, 2],
    },
    "granite_speech": {"encoder_config.context_size": 16},
    "granite_speech_plus": {"encoder_config.context_size": 16},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["mamba", "attention", "mamba"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl": _inside("text_config", _HUNYUAN)
    | {"vision_config.max_image_size": 64, "vision_config.max_vit_seq_len": 256},
    "hunyuan_vl_text": _HUNYUAN,
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "janus": _CODEBOOK,
    "kimi_linear": {"linear_head_dim": 32, "linear_num_heads": 4},
    "led": {"attention_window": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "lilt": {"hidden_size": 384, "num_attention_heads": 4},
    "longformer": {"attention_window": 16},
    "mamba": {"time_step_rank": 32},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "ministral": {"head_dim": 16},
    "molmo2": {"adapter_config.vision_feature_layer": [2, 1]},
    "moshi": {"ffn_dim": 128, "depth_decoder_config.ffn_dim": 128},
    "muse_spark": _inside(
        "audio_config",
        {"hidden_sizes": [32, 32, 64, 64], "depths": [1] * 4, "num_hidden_layers": 4},
    ),
    "nemo_speechlm": _inside("text_config", _NEMOTRON)
    | {
        "audio_config.asr_config.num_key_value_heads": 4,
        "audio_config.diarization_config.audio_config.num_key_value_heads": 4,
        "word_timestamp_config.num_key_value_heads": 4,
    },
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron_h": _NEMOTRON,
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2}
    | _inside("text_config", _NEMOTRON),
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "perception_lm": {"vision_config": {**_SIGLIP, "model_args": {"embed_dim": 64}}},
    "qwen2_5_omni": {"enable_audio_output": False},
    "qwen3_omni_moe": {"enable_audio_output": False},
    "qwen4_exp": _inside("text_config", _SPARSE_INDEX),
    "qwen4_exp_text": _SPARSE_INDEX,
    "recurrent_gemma": {"intermediate_size": 128},
    "reformer": {
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [32, 32],
        "attn_layers": ["local", "lsh", "local"],
    },
    "step3p7": {"text_config.sliding_window": 16, "vision_config.mlp_ratio": 4.0},
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
    "vibevoice_asr": _inside("acoustic_tokenizer_encoder_config", _TOKENIZER_STAGES)
    | _inside("semantic_tokenizer_encoder_config", _TOKENIZER_STAGES),
    "whisper": {"max_source_positions": 24},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layer_types": ["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"],
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
    },
    "zamba2": {
        "num_hidden_layers": 5,
        "layers_block_type": _ZAMBA2_LAYERS,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
    },
    "glm4v_moe": _inside("text_config", _HALF_MULTI_ROPE),
    "glm4v_moe_text": _HALF_MULTI_ROPE,
}
for _type in (
    "qwen2_vl",
    "qwen2_5_vl",
    "glm4v",
    "glm46v",
    "glmga",
    "glm_ocr",
    "glm_image",
    "paddleocr_vl",
):
    EXCEPTIONS[_type] = _inside("text_config", _MULTI_ROPE)
for _type in ("glm4v_text", "glm_ocr_text", "glm_image_text", "qwen2_vl_text", "qwen2_5_vl_text"):
    EXCEPTIONS[_type] = _MULTI_ROPE
for _type in ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"):
    EXCEPTIONS[_type] = _inside("text_config", _MULTI_ROPE) | {
        "vision_start_token_id": 120,
        "vision_end_token_id": 121,
    }

# What famous checkpoints of a type have and its default config has not.
VARIANTS: dict[str, dict[str, Any]] = {
    "gemma4@e2b": _inside("text_config", _SHARED_KEYS),
    "gemma4@moe": _inside("text_config", _GEMMA4_EXPERTS),
    "gemma4_text@e2b": _SHARED_KEYS,
    "gemma4_text@moe": _GEMMA4_EXPERTS,
    "t5@gated": {"feed_forward_proj": "gated-gelu"},
}

# Types that are no language model which stands alone, and why.
EXCLUDED = {
    "blip": "its forward needs an image",
    "blip-2": "its forward needs an image",
    "diffusion_gemma": "block diffusion from a random canvas: no output to compare",
    "encoder-decoder": "a pair of other types",
    "gemma4_assistant": "a draft head that reads the target model's keys and values",
    "gemma4_unified_assistant": "a draft head that reads the target model's keys and values",
    "idefics": "its forward needs an image",
    "instructblip": "its forward needs an image",
    "instructblipvideo": "its forward needs an image",
    "kosmos-2": "its forward needs an image",
    "kosmos-2.5": "its forward needs an image",
    "kyutai_speech_to_text": "its ids are text and codes of sound together",
    "layoutlmv2": "needs detectron2",
    "layoutlmv3": "needs boxes beside text",
    "musicgen": "a decoder of audio codes",
    "musicgen_melody": "a decoder of audio codes",
    "perceiver": "its forward takes bytes of any kind under another name",
    "pi0": "a robot's policy: needs images and a state",
    "pix2struct": "reads images only",
    "pp_formulanet": "reads images only",
    "qwen2_5_omni": "has no forward of its own; its thinker is swept",
    "qwen3_omni_moe": "has no forward of its own; its thinker is swept",
    "seamless_m4t": "text to text is one of four models in one",
    "seamless_m4t_v2": "text to text is one of four models in one",
    "shieldgemma2": "transformers' Auto mapping names a class of another type for it",
    "udop": "needs boxes beside text",
    "vision-encoder-decoder": "a pair of other types",
    "voxtral_realtime": "its forward needs sound",
}

# Text models that only AutoModel knows.
TEXT_BODIES = (
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "qwen3_vl_moe_text",
    "glm4v_text",
    "glm4v_moe_text",
    "glm_ocr_text",
    "glm_image_text",
    "glm5_next_text",
    "granite_docling_text",
    "hunyuan_vl_text",
    "mistral_large4_text",
    "muse_glimmer_text",
    "muse_spark_text",
    "cosmos3_edge_text",
    "embedding_gemma2_text",
    "embedding_gemma2",
    "t5gemma2_encoder",
    "dpr",
    "splinter",
    "visual_bert",
    "openai_privacy_filter",
    "modernvbert",
)
# Decoders behind an audio tower, which transformers lists among encoder-decoders.
BEHIND_AUDIO = {
    "audioflamingo3",
    "musicflamingo",
    "glmasr",
    "moss_transcribe_diarize",
    "nemo_speechlm",
    "qwen2_audio",
    "qwen3_asr",
    "vibevoice_asr",
    "voxtral",
}
SPEECH = ("whisper", "speech_to_text")  # encoders of sound, decoders of text
CLASSIFIERS = (
    "bert",
    "roberta",
    "xlm-roberta",
    "deberta-v2",
    "modernbert",
    "qwen3",
    "llama",
    "gemma3_text",
    "distilbert",
    "mpnet",
    "bart",
    "t5",
)


@dataclass(frozen=True)
class Kind:
    """A model type in a role: "causal", "vlm", "seq2seq", "encoder" or "seqcls"."""

    type: str
    role: str
    class_name: str

    def __str__(self) -> str:
        return f"{self.type}:{self.role}"

    @property
    def base(self) -> str:
        """The type in transformers; "gemma4@moe" is a variant, "llama#7" a draw."""
        return self.type.partition("#")[0].partition("@")[0]

    def drawn(self, seed: int) -> Kind:
        """The same kind with other sizes and switches."""
        return dataclasses.replace(self, type=f"{self.type}#{seed}")

    @property
    def generates(self) -> bool:
        return self.role in ("causal", "vlm", "seq2seq")


def all_kinds() -> list[Kind]:
    """Every text-bearing type of the installed transformers, in the role in which people use it."""
    classes = _classes()
    for variant in VARIANTS:
        base = variant.partition("@")[0]
        for (type_, role), name in list(classes.items()):
            if type_ == base and role != "seqcls":
                classes[variant, role] = name
    kinds = [Kind(type_, role, name) for (type_, role), name in classes.items()]
    return [kind for kind in kinds if kind.base not in EXCLUDED]


def _classes() -> dict[tuple[str, str], str]:
    """(type, role) → class name."""
    causal, masked = (
        _names(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        _names(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    )
    seq2seq = _names(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    encoders, bodies = (
        _names(auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES),
        _names(auto.MODEL_MAPPING_NAMES),
    )
    # younger than transformers 4
    every = getattr(auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})
    multimodal = _names(every) | _names(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    found: dict[tuple[str, str], str] = {}
    for type_, name in causal.items():
        whole = name.endswith("ForConditionalGeneration") or multimodal.get(type_) == name
        is_encoder = type_ in masked and type_ not in seq2seq
        if not (type_ in multimodal and whole) and not is_encoder:
            found[type_, "causal"] = name
    for type_, name in multimodal.items():
        found[type_, "seq2seq" if type_ == "t5gemma2" else "vlm"] = name
    for type_, name in seq2seq.items():
        if type_ not in multimodal:
            found[type_, "vlm" if type_ in BEHIND_AUDIO else "seq2seq"] = name
    for type_ in {**masked, **encoders}:
        is_known = (type_, "vlm") in found or (type_, "causal") in found or type_ in seq2seq
        if not is_known:
            found[type_, "encoder"] = bodies.get(type_) or encoders.get(type_) or masked[type_]
    for type_ in TEXT_BODIES:
        if type_ in bodies:
            found[type_, "encoder"] = bodies[type_]
    found["t5", "encoder"] = "T5EncoderModel"
    for type_, name in _names(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES).items():
        if type_ in CLASSIFIERS or not any(known == type_ for known, _ in found):
            found[type_, "seqcls"] = name
    for type_, name in _names(auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES).items():
        if type_ in SPEECH:
            found[type_, "seq2seq"] = name
    return found


def _names(mapping: dict[str, Any]) -> dict[str, str]:
    return {
        key: value[0] if isinstance(value, (tuple, list)) else value
        for key, value in mapping.items()
    }


# Configs


def tiny_config(type_: str) -> Any:
    """A small config of a model type or variant; "llama#7" is llama of the sizes and switches that
    are drawn with seed 7."""
    type_, _, seed = type_.partition("#")
    base = type_.partition("@")[0]
    config_class = CONFIG_MAPPING[base]
    settings = shrunk(config_class, {**EXCEPTIONS.get(base, {}), **VARIANTS.get(type_, {})})
    if seed:
        draw(config_class, settings, int(seed))
    config = config_class(**settings)
    if (
        getattr(config, "is_encoder_decoder", False)
        and "decoder_start_token_id" not in config.__dict__
    ):
        config.decoder_start_token_id = settings.get("pad_token_id") or 0  # as in every checkpoint
    return config


def fields_of(config_class: Any) -> dict[str, Any]:
    """Field → its default. Configs of transformers 4 are no dataclasses: their fields are what they
    and their parents take."""
    if dataclasses.is_dataclass(config_class):
        return {field.name: field.default for field in dataclasses.fields(config_class)}
    found: dict[str, Any] = {}
    for parent in reversed(config_class.__mro__[:-1]):
        if "__init__" in vars(parent):
            taken = list(inspect.signature(parent.__init__).parameters.values())[1:]
            found |= {
                parameter.name: parameter.default
                for parameter in taken
                if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            }
    return found


def draw(config_class: Any, settings: dict[str, Any], seed: int) -> None:
    """Other sizes and switches than the usual ones for the text part of `settings`, in place: what
    people who do not know these rules would try."""
    generator = random.Random(seed)
    default = config_class()
    part = settings.get("text_config")
    if isinstance(part, dict):
        default, settings = default.text_config, part
    held = fields_of(type(default))
    for pattern, choices in DRAWS:
        for name in sorted(held):
            now = settings.get(name, default.__dict__.get(name))
            same_kind = type(now) in {type(choice) for choice in choices}
            if re.fullmatch(pattern, name) and same_kind:
                settings[name] = generator.choice(choices)


def shrunk(
    config_class: Any,
    overrides: dict[str, Any],
    placeholders: dict[str, int] | None = None,
    inner: bool = False,
) -> dict:
    """Arguments that make a small `config_class`.

    overrides: values by name, "text_config.num_experts" those of a part. placeholders: ids given so
    far. inner: of a part.
    """
    placeholders = {} if placeholders is None else placeholders
    own = {key: value for key, value in overrides.items() if "." not in key}
    default = config_class()
    parts = getattr(config_class, "sub_configs", None) or {}
    shrinker = _Shrinker(config_class, default, placeholders, inner)
    settings = shrinker.settings(skip=parts)
    for name, part_class in parts.items():
        part = getattr(default, name, None)
        if (part is None or isinstance(part, dict)) and own.get(name) is TOWER:
            part = _default_part(config_class, name, part_class)
        if part is None or isinstance(part, dict):
            continue
        inside = {
            key.removeprefix(f"{name}."): value
            for key, value in overrides.items()
            if key.startswith(f"{name}.")
        }
        settings[name] = shrunk(type(part), inside, placeholders, inner=True)
        if part.model_type:
            settings[name] = {"model_type": part.model_type, **settings[name]}
    return settings | {key: value for key, value in own.items() if value is not TOWER}


def _default_part(config_class: Any, name: str, part_class: Any) -> Any:
    """The default config of a part; what takes any kind of config names a type beside it."""
    if part_class is not transformers.AutoConfig:
        return part_class()
    spec = config_class.sub_configs_defaults[name]
    return CONFIG_MAPPING[spec.model_type](**spec.init_kwargs)


class _Shrinker:
    """The fields of one config class, one by one."""

    def __init__(
        self, config_class: Any, default: Any, placeholders: dict[str, int], inner: bool
    ) -> None:
        aliases = config_class.attribute_map or {}
        self.default, self.placeholders, self.inner = default, placeholders, inner
        self.declared = fields_of(config_class)
        # What the instance holds: past properties, which may be views.
        self.held = {name: default.__dict__.get(aliases.get(name, name)) for name in self.declared}
        self.layer_field = next(
            (name for name in LAYER_COUNTS if isinstance(self.held.get(name), int)), None
        )
        self.kept_layers = self._kept_layers()
        self.layers = LAYERS if self.kept_layers is None else len(self.kept_layers)

    def settings(self, skip: Iterable[str]) -> dict[str, Any]:
        """The fields that differ from the default."""
        found: dict[str, Any] = {}
        for name, value in self.held.items():
            if name.startswith("_") or name in LEFT_ALONE or name in skip:
                continue
            new = self._small(name, value)
            if new is not value and new != value:
                found[name] = new
        if self.kept_layers is not None and self.layer_field:
            found[self.layer_field] = self.layers
        for name in ("rope_parameters", "rope_scaling"):  # of transformers 5 and 4
            rope = self.default.__dict__.get(name)
            if isinstance(rope, dict) and _small_rope(rope) != rope:
                found[name] = _small_rope(rope)
        return found

    def _small(self, name: str, value: Any) -> Any:
        if self._is_per_layer(value):
            return [value[i] for i in self.kept_layers or ()]
        if (
            value is None
            and name in ("pad_token_id", "bos_token_id", "eos_token_id")
            and not self.inner
        ):
            return TOKENS[name]
        if isinstance(value, bool) or value is None:
            return value
        if name == "eos_token_id" and isinstance(value, (list, tuple)):
            return 2
        if name in ("image_size", "patch_size") and isinstance(value, (list, tuple)):
            return type(value)(self._size(name, part) for part in value)
        if not isinstance(value, int):
            return value
        if TOKEN_FIELD.search(name) and "layer" not in name:
            return self._token(name)
        made_of_others = self.declared.get(name, 0) is None and name != "num_key_value_heads"
        return value if made_of_others else self._size(name, value)

    def _token(self, name: str) -> int | None:
        if name in TOKENS:
            return TOKENS[name]
        number = TEXT_IDS + len(self.placeholders) % (VOCABULARY - TEXT_IDS)
        return self.placeholders.setdefault(name.replace("token_index", "token_id"), number)

    def _size(self, name: str, value: int) -> int:
        size = next((size for pattern, size in SIZES if re.search(pattern, name)), None)
        if size is None or value < 0:
            return value
        if size == "kv_heads":
            return value if value < KV_HEADS else HEADS if self._one_key_a_query() else KV_HEADS
        return min(value, self.layers if size == "layers" else size)

    def _one_key_a_query(self) -> bool:
        """Whether a type of latent attention has as many keys as queries."""
        heads = next((self.held[name] for name in HEAD_COUNTS if self.held.get(name)), None)
        return "kv_lora_rank" in self.held and self.held.get("num_key_value_heads") == heads

    def _is_per_layer(self, value: Any) -> bool:
        count = self.held.get(self.layer_field) if self.layer_field else None
        return (
            isinstance(value, (list, tuple)) and bool(count) and count != 1 and len(value) == count
        )

    def _kept_layers(self) -> list[int] | None:
        """Indices of layers of every kind, and of one more, so that a structure is met twice; None
        for uniform models."""
        columns = [list(value) for value in self.held.values() if self._is_per_layer(value)]
        if not columns:
            return None
        kinds = list(zip(*columns))
        firsts = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
        if len(firsts) > MAX_LAYER_KINDS:
            firsts = firsts[:LAYERS]
        others = [i for i in range(len(kinds)) if i not in firsts]
        wanted = max(LAYERS, len(firsts) + (len(firsts) > 1))
        return sorted(firsts + others[: max(0, wanted - len(firsts))])


def _small_rope(rope: dict[str, Any]) -> dict[str, Any]:
    if any(isinstance(value, dict) for value in rope.values()):
        return {
            key: _small_rope(value) if isinstance(value, dict) else value
            for key, value in rope.items()
        }
    small = dict(rope)
    if "mrope_section" in small:
        sections = len(small["mrope_section"])
        total = int(HEAD // 2 * small.get("partial_rotary_factor", 1.0))
        small["mrope_section"] = [total - (sections - 1) * (total // sections)] + [
            total // sections
        ] * (sections - 1)
    for key in ("short_factor", "long_factor"):
        if isinstance(small.get(key), list):
            small[key] = small[key][: HEAD // 2]
    if "original_max_position_embeddings" in small:
        small["original_max_position_embeddings"] = 64
    return small


# Models


def build(kind: Kind, seed: int = 0) -> nn.Module:
    """A float32 model in evaluation mode with random weights. Raises whatever transformers raises,
    ValueError when too large."""
    _stand_in_for_timm()
    model_class = getattr(transformers, kind.class_name)
    config = _config_for(model_class, tiny_config(kind.type))
    torch.manual_seed(seed)
    made = (
        model_class._from_config(config, dtype=torch.float32)
        if hasattr(model_class, "_from_config")
        else model_class(config)
    )
    parameters = sum(parameter.numel() for parameter in made.parameters())
    if parameters > MAX_PARAMETERS:
        raise ValueError(f"the tiny model has {parameters / 1e6:.0f} million parameters")
    randomize(made, seed)
    return made.eval()


def _config_for(model_class: Any, config: Any) -> Any:
    """The config itself, or the part of it that the class is made of."""
    wanted = model_class.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    for name in ("text_config", "decoder", "language_config", "llm_config", "thinker_config"):
        part = getattr(config, name, None)
        if isinstance(part, wanted):
            return part
    text = config.get_text_config()
    return text if isinstance(text, wanted) else config


def _stand_in_for_timm() -> None:
    """Convolutions in place of timm's towers, which text never reaches."""
    from transformers.models.timm_wrapper import modeling_timm_wrapper as wrapper

    def towers(*_args: Any, **_kwargs: Any) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))

    wrapper.requires_backends = lambda *_args, **_kwargs: None
    wrapper._create_timm_model_with_error_handling = towers


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Unit gain for all that multiplies, small biases, and norms of which one channel in twelve
    stands out."""
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in done and parameter.is_floating_point():
                done.add(id(parameter))
                _randomize(name, module, leaf, parameter, generator)


def _randomize(
    name: str, module: nn.Module, leaf: str, parameter: Tensor, generator: torch.Generator
) -> None:
    noise = torch.randn(parameter.shape, generator=generator)
    kind = type(module).__name__
    shape = parameter.shape
    if is_linear(module) and leaf == "weight":
        parameter.copy_(noise / shape[0 if kind == "Conv1D" else 1] ** 0.5)
    elif isinstance(module, nn.Embedding):
        parameter.copy_(0.5 * noise)
        if module.padding_idx is not None:
            parameter[module.padding_idx] = 0
    elif parameter.dim() == 1 and "norm" in kind.lower() and leaf == "weight":
        outlying = torch.rand(shape, generator=generator) < 1 / 12
        parameter.add_(0.3 * noise + 4.0 * outlying)
    elif parameter.dim() == 1 and leaf == "bias":
        parameter.add_(0.1 * noise)
    elif parameter.dim() == 3 and is_expert(name, module, leaf, parameter):
        parameter.copy_(noise / max(1, min(shape[1:])) ** 0.5)
    elif (
        parameter.dim() == 2
        and not isinstance(module, (nn.Conv1d, nn.Conv2d))
        and float(parameter.abs().max()) < 0.2
    ):
        parameter.copy_(noise / shape[1] ** 0.5)  # routers and bare matrices
    elif parameter.dim() == 1 and float(parameter.abs().max()) < 1e-3:
        parameter.add_(0.02 * noise)


def is_linear(module: nn.Module) -> bool:
    """nn.Linear and its kin, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_expert(name: str, module: nn.Module, leaf: str, parameter: Tensor) -> bool:
    """Whether a parameter [experts, …, …] holds the weights of several experts."""
    if parameter.dim() != 3 or isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
        return False
    return "expert" in (name + type(module).__name__).lower() or leaf in (
        "gate_up_proj",
        "down_proj",
        "w1",
        "w2",
        "w3",
        "v1",
    )


# Inputs


def inputs(
    kind: Kind,
    model: nn.Module,
    rows: int = 4,
    length: int = 24,
    seed: int = 7,
    padding: str | None = None,
) -> dict:
    """Random text ids and a mask int64 [rows, length], a decoder's ids, sound for models that read
    sound.

    padding: "left", "right" or None, for none.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, TEXT_IDS, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows) if padding else ():
        places = slice(0, 3 * row) if padding == "left" else slice(length - 3 * row, length)
        mask[row, places] = 0
        ids[row, places] = 0
    # the heads of BART and T5 read the last token, which must end the text
    if kind.role == "seqcls":
        last = (mask * torch.arange(length)).argmax(1)
        ids[torch.arange(rows), last] = 2
    item = {"input_ids": ids, "attention_mask": mask}
    if kind.base in SPEECH and kind.role == "seq2seq":
        item = {"input_features": _sound(model, rows, generator)}
    if kind.role == "seq2seq":
        item["decoder_input_ids"] = torch.randint(5, TEXT_IDS, (rows, 9), generator=generator)
    return item


def _sound(model: nn.Module, rows: int, generator: torch.Generator) -> Tensor:
    """Random features as the model's own forward wants them."""
    config: Any = model.config
    if config.model_type == "whisper":
        return torch.randn(
            rows, config.num_mel_bins, 2 * config.max_source_positions, generator=generator
        )
    return torch.randn(rows, 48, config.input_feat_per_channel, generator=generator)
