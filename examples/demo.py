"""Quantizes a real embedding model and a real small language model, loads them again, and prints
what it cost and gained.

`make demo`, or `python examples/demo.py --json result.json`. Both models come from PyPI packages;
no model hub is needed.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
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
    quantize_model,
)
from awq.evals.divergence import divergence
from awq.evals.similarity import mean_cosine

MEASURED_TOKENS = 4096
ROUND_TO_NEAREST = QuantizeOptions(preset="fast", scaling=False, clip=False, bias_correction=False)


def size(folder: Path) -> float:
    """Weights in MB."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6


def unseen_text() -> str:
    """The language reference that comes with Python: nothing here was calibrated on it or written
    like it."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def sentences_of(text: str, count: int) -> list[str]:
    """`count` sentences of 40 to 300 characters, evenly spread over the text."""
    pieces = [" ".join(piece.split()) for piece in re.split(r"(?<=[.!?])\s+|\n\n", text)]
    pieces = [piece for piece in dict.fromkeys(pieces) if 40 <= len(piece) <= 300]
    return pieces[:: max(1, len(pieces) // count)][:count]


def embedding_model() -> dict:
    """all-MiniLM-L6-v2 at group 128, calibrated on the bundled sentences; cosine on sentences of
    another text."""
    source, target = minilm_dir(), CACHE / "all-MiniLM-L6-v2-awq"
    tokenizer = AutoTokenizer.from_pretrained(source)
    held_out = sentences_of(unseen_text(), 1000)
    full = Encoder.from_pretrained(source).encode(held_out)
    model = AutoAWQForCausalLM.from_pretrained(str(source))
    settings = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    report = model.quantize(tokenizer, quant_config=settings, calib_data=None)
    model.save_quantized(str(target))
    plain = AutoModel.from_pretrained(source)
    # rounding to nearest does not look at them
    any_tokens = load_calibration(held_out[:4], tokenizer, mode="rows")
    quantize_model(plain, any_tokens, AwqConfig(group_size=128), ROUND_TO_NEAREST)
    after = Encoder.from_pretrained(target).encode(held_out)
    return {
        "model": "all-MiniLM-L6-v2",
        "measure": "mean cosine",
        "mb_before": size(source),
        "mb_after": size(target),
        "before": 1.0,
        "round_to_nearest": mean_cosine(full, Encoder(plain, tokenizer).encode(held_out)),
        "after": mean_cosine(full, after),
        "seconds": report.seconds,
    }


def language_model() -> list[dict]:
    """SmolLM2-135M at group 64: 32 × 256 tokens of the bundled text; perplexity and KL on 4,096
    tokens of another text."""
    source, target = smollm2_dir(), CACHE / "smollm2-135m-awq"
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = torch.tensor(tokenizer(unseen_text(), verbose=False)["input_ids"])[:MEASURED_TOKENS]
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    batches = load_calibration([ids[:64].tolist()])  # rounding to nearest does not look at them
    quantize_model(plain, batches, AwqConfig(group_size=64), ROUND_TO_NEAREST)
    nearest = divergence(dense, plain, ids)
    del plain
    model = AutoAWQForCausalLM.from_pretrained(str(source), torch_dtype="float32")
    settings = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    report = model.quantize(
        tokenizer,
        quant_config=settings,
        calib_data=None,
        max_calib_samples=32,
        max_calib_seq_len=256,
    )
    model.save_quantized(str(target))
    loaded = AutoAWQForCausalLM.from_quantized(str(target), fuse_layers=True)
    after = divergence(dense, loaded, ids)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name three rivers in Europe."}],
        tokenize=False,
        add_generation_prompt=True,
    )
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    print("\nSmolLM2, 4-bit: ", end="", flush=True)
    start = time.perf_counter()
    out = loaded.generate(
        tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
        max_new_tokens=24,
        do_sample=False,
    )
    speed = (out.shape[1] - tokens.shape[1]) / (time.perf_counter() - start)
    row = {
        "model": "SmolLM2-135M",
        "mb_before": size(source),
        "mb_after": size(target),
        "seconds": report.seconds,
    }
    perplexities = {
        "measure": "perplexity",
        "before": after.perplexity_before,
        "round_to_nearest": nearest.perplexity_after,
        "after": after.perplexity_after,
        "tokens_per_second": speed,
    }
    kl = {
        "measure": "KL, nats",
        "before": 0.0,
        "round_to_nearest": nearest.mean_kl,
        "after": after.mean_kl,
    }
    return [row | perplexities, row | kl]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING)
    rows = [embedding_model(), *language_model()]
    print(
        "\nCalibrated on the bundled text, measured on the language reference that comes with "
        "Python (pydoc_data.topics):"
    )
    print(
        f"{'model':18s} {'MB':>7s} {'4-bit':>7s}  {'measure':12s} {'before':>8s} {'nearest':>8s} "
        f"{'AWQ':>8s} {'seconds':>8s}"
    )
    for r in rows:
        print(
            f"{r['model']:18s} {r['mb_before']:7.1f} {r['mb_after']:7.1f}  {r['measure']:12s} "
            f"{r['before']:8.4f} "
            f"{r['round_to_nearest']:8.4f} {r['after']:8.4f} {r['seconds']:8.1f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
