"""Quantizes a language model, measures what that cost on text of your own, and saves it.

    python examples/quantize.py MODEL OUTPUT --texts texts.txt

MODEL is a local directory or a hub id. The first half of the texts calibrates, the second judges.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM

from awq import AutoAWQForCausalLM
from awq.calibration.sources import named_texts
from awq.evals.divergence import divergence


def main(argv: list[str] | None = None) -> float:
    """Returns the mean KL divergence from the original, in nats a token."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--texts", required=True, help=".txt, .jsonl, .csv or .parquet")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--preset", default="balanced", choices=["fast", "balanced", "best"])
    arguments = parser.parse_args(argv)

    texts = named_texts(arguments.texts, "train", "text", limit=4096)
    seen, held_out = texts[: len(texts) // 2], texts[len(texts) // 2 :]

    model = AutoAWQForCausalLM.from_pretrained(arguments.model)
    report = model.quantize(
        model.tokenizer,
        quant_config={"q_group_size": arguments.group_size},
        calib_data=seen,
        preset=arguments.preset,
    )
    print(report.summary())

    ids = model.tokenizer("\n\n".join(held_out), verbose=False)["input_ids"]
    original = AutoModelForCausalLM.from_pretrained(arguments.model).to(model.device)
    report.evaluation = divergence(original, model, torch.tensor(ids), limit=16_384)
    print(report.evaluation.summary())

    model.save_quantized(arguments.output)  # weights, tokenizer, report and model card
    return report.evaluation.mean_kl


if __name__ == "__main__":
    main()
