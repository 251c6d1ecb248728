"""The examples run on tiny models; those of vLLM and Ray need their packages and run by hand."""

import pytest
import torch
from guide_models import make_models, make_tokenizer

from awq.calibration.sources import bundled_texts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `llama`, texts, and `llama-awq` as the first example writes it; its KL."""
    import quantize

    root = tmp_path_factory.mktemp("examples")
    make_models(root, make_tokenizer(), positions=96, encoder_positions=34)
    (root / "texts.txt").write_text("\n\n".join(bundled_texts()[:40]), encoding="utf-8")
    arguments = [root / "llama", root / "llama-awq", "--texts", root / "texts.txt"]
    kl = quantize.main([*map(str, arguments), "--preset", "fast"])
    return root, kl


def test_quantize_measures_what_it_saved(place):
    root, kl = place
    assert 0 < kl < 0.1
    assert f"{kl:.4f}" in (root / "llama-awq/README.md").read_text(encoding="utf-8")


def test_inference(place, capsys):
    import inference

    root, _ = place
    prompts = ["Where are you?", "One mile north."]
    answers = inference.main([str(root / "llama-awq"), *prompts, "--max-new-tokens", "4"])
    assert len(answers) == 2 and "generation: fused" in capsys.readouterr().out


def test_custom_calibration(place):
    import custom_calibration

    errors = custom_calibration.main([str(place[0] / "llama")])
    assert set(errors) == {"texts", "a file", "token ids", "the bundled text", "chats"}
    assert errors["texts"] == errors["a file"], "equal texts give equal models"


def test_lora(place, tmp_path):
    import lora
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    root, _ = place
    arguments = [root / "llama-awq", root / "texts.txt", tmp_path / "adapter"]
    losses = lora.main([*map(str, arguments), "--steps", "8", "--tokens", "32"])
    assert losses[-1] < losses[0]
    ids = torch.arange(3, 19)[None]
    model = AutoModelForCausalLM.from_pretrained(root / "llama-awq")
    before = model(ids).logits
    tuned = PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert not torch.allclose(tuned(ids).logits, before)
