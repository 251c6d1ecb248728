"""Calibration with images and sound, and towers that are quantized when asked for."""

import numpy as np
import pytest
import torch
import transformers
from conftest import make_tokenizer
from test_kinds import TOWER, built, vision_language

from awq import AutoAWQForCausalLM
from awq.checkpoint.source import position_limit
from awq.errors import CalibrationError, ConfigError
from awq.models.base import BaseAWQForCausalLM

GROUPS = {"q_group_size": 16}
PATCHES = 4  # of an image of 16 × 16
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip


def llava(image_id=63, vocabulary=64):
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT, "vocab_size": vocabulary},
        vision_config={"model_type": "clip_vision_model", **TOWER},
        image_token_index=image_id,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    return built(config)


def image_inputs(seed, samples=8):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(samples):
        words = torch.randint(3, 60, (1, 8), generator=generator)
        ids = torch.cat([words[:, :2], torch.full((1, PATCHES), 63), words[:, 2:]], 1)
        pixels = 3 * torch.randn(1, 3, 16, 16, generator=generator)
        mask = torch.ones_like(ids)
        found.append({"input_ids": ids, "attention_mask": mask, "pixel_values": pixels})
    return found


def two_images(seed):
    """One row with two images, the second behind its sixteenth token."""
    generator = torch.Generator().manual_seed(seed)
    image, words = torch.full((PATCHES,), 63), torch.randint(3, 60, (14,), generator=generator)
    ids = torch.cat([words[:2], image, words[2:12], image, words[12:]]).unsqueeze(0)
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}


def many_patches(seed):
    """One row with one image, whose patches are rows of `pixel_values`."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 60, (6,), generator=generator)
    marks = torch.tensor([62, *[60] * 4, 63])  # image_token_id between start and end
    ids = torch.cat([words[:2], marks, words[2:]]).unsqueeze(0)
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == 60).int(),
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


@torch.no_grad()
@pytest.mark.parametrize("kind, sample", [("llava", two_images), ("qwen2_5_vl", many_patches)])
def test_images_need_not_be_as_many_as_rows(kind, sample):
    original, samples = vision_language(kind), [sample(seed) for seed in range(8)]
    wrapper = BaseAWQForCausalLM(vision_language(kind), "./tiny")
    report = wrapper.quantize(samples, quant_config=GROUPS, preset="fast")
    expected, found = (model(**sample(9)).logits for model in (original, wrapper.model))
    assert len(report.linears) == 2 * 7
    assert (found - expected).norm() < 0.5 * expected.norm()


@torch.no_grad()
def error_on_images(model, original):
    parts = [model(**item).logits - original(**item).logits for item in image_inputs(9)]
    return float(torch.cat(parts, 1).norm())


def test_images_are_seen_and_towers_stay_dense_unless_asked_for(tmp_path):
    original = llava()
    original.save_pretrained(tmp_path / "dense")
    text_only = [{"input_ids": item["input_ids"][:, 6:]} for item in image_inputs(1)]
    reports, errors = {}, {}
    for name, data in (("text", text_only), ("images", image_inputs(1))):
        wrapper = AutoAWQForCausalLM.from_pretrained(tmp_path / "dense")
        reports[name] = wrapper.quantize(data, quant_config=GROUPS)
        errors[name] = error_on_images(wrapper.model, original)
    assert errors["images"] < errors["text"]
    assert reports["images"].tokens == 8 * 12
    assert all("language_model" in line.name for line in reports["images"].linears)
    tower = {n: r for n, r in reports["images"].skipped.items() if "vision_tower" in n}
    assert tower and all("not asked for" in reason for reason in tower.values())

    wrapper = AutoAWQForCausalLM.from_pretrained(tmp_path / "dense")
    report = wrapper.quantize(image_inputs(1), quant_config=GROUPS, towers=("vision_tower",))
    assert sum("vision_tower" in line.name for line in report.linears) == 2 * 6
    assert all(line.loss <= line.loss_rtn * 1.001 for line in report.linears)
    wrapper.save_quantized(tmp_path / "quantized")
    loaded = AutoAWQForCausalLM.from_quantized(tmp_path / "quantized", device="cpu")
    item = image_inputs(5)[0]
    assert torch.equal(loaded.model(**item).logits, wrapper.model(**item).logits)


def test_texts_are_as_long_as_the_text_part_allows():
    """Its positions are in a config of its own."""
    wrapper = BaseAWQForCausalLM(llava(), "llava")
    report = wrapper.quantize(torch.randint(3, 60, (4, 16)), quant_config=GROUPS, preset="fast")
    assert report.tokens == 4 * 16
    assert position_limit(wrapper.config) == TEXT["max_position_embeddings"]


def test_towers_that_are_not_there_or_not_reached():
    for towers, data, error in (
        (("ears",), image_inputs(1), ConfigError),
        (("vision_tower",), torch.randint(3, 60, (8, 16)), CalibrationError),
        (3, image_inputs(1), ConfigError),
    ):
        with pytest.raises(error, match="towers"):
            BaseAWQForCausalLM(llava(), "llava").quantize(data, quant_config=GROUPS, towers=towers)


class Processor:
    """Does what processors of vision-language models do, without an image library: a placeholder
    becomes as many tokens as an image has patches, and pictures become numbers."""

    def __init__(self, tokenizer):
        self.tokenizer, self.image_processor = tokenizer, self.pixels

    def pixels(self, image):
        values = torch.as_tensor(image[:16, :16]).permute(2, 0, 1)
        return {"pixel_values": (values / 127.5 - 1).unsqueeze(0).float()}

    def __call__(self, images, text, return_tensors):
        text = text.replace("<image>", "<image>" * PATCHES)
        return self.tokenizer(text, return_tensors=return_tensors) | self.pixels(images)


def test_a_processor_makes_samples_of_images_and_text():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    picture = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    samples = [{"images": picture, "text": "<image> a picture of the sea"}] * 4
    wrapper = BaseAWQForCausalLM(llava(image_id, len(tokenizer)), "llava")
    report = wrapper.quantize(Processor(tokenizer), GROUPS, samples)
    words = len(tokenizer("<image> a picture of the sea")["input_ids"])
    assert report.tokens == 4 * (words + PATCHES - 1)
    with pytest.raises(CalibrationError, match="need the model's processor"):
        BaseAWQForCausalLM(llava(), "llava").quantize(tokenizer, GROUPS, samples)


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8,
        max_source_positions=12, max_target_positions=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, begin_suppress_tokens=None,
    )  # fmt: skip
    config.architectures = ["WhisperForConditionalGeneration"]
    return built(config)


@torch.no_grad()
def test_whisper_is_calibrated_with_sound(tmp_path):
    """Both stacks; and labels are what the decoder is to say, so it reads them shifted."""
    model = whisper()
    model.save_pretrained(tmp_path / "dense")
    wrapper = AutoAWQForCausalLM.from_pretrained(tmp_path / "dense")
    generator = torch.Generator().manual_seed(0)
    sound = torch.randn(12, 8, 24, generator=generator)
    labels = torch.randint(3, 60, (12, 9), generator=generator)
    report = wrapper.quantize({"input_features": sound, "labels": labels}, quant_config=GROUPS)
    stacks = {line.name.split(".")[1] for line in report.linears}
    assert stacks == {"encoder", "decoder"} and report.tokens == 12 * 9
    assert all(line.loss <= line.loss_rtn * 1.001 for line in report.linears)
    wrapper.save_quantized(tmp_path / "quantized")
    loaded = AutoAWQForCausalLM.from_quantized(tmp_path / "quantized", device="cpu")
    dense = type(model).from_pretrained(tmp_path / "quantized").dequantize()
    item = {"input_features": sound[:2], "decoder_input_ids": labels[:2]}
    torch.testing.assert_close(
        loaded.model(**item).logits, dense(**item).logits, rtol=1e-4, atol=1e-4
    )
    tokens = loaded.generate(input_features=sound[:2], max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, dense.generate(sound[:2], max_new_tokens=4, do_sample=False))
