"""Trains a LoRA adapter on a quantized language model; `pip install peft` first.

    python examples/lora.py DIRECTORY texts.txt ADAPTER

The packed weights stay as they are. Only the adapter is trained and saved, in 16 or 32 bits.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import awq  # noqa: F401 - lets transformers and PEFT read quantized directories
from awq.calibration.batches import load_calibration


def main(argv: list[str] | None = None) -> list[float]:
    """Returns the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("texts")
    parser.add_argument("adapter")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128, help="of a row")
    arguments = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(arguments.directory)
    model = AutoModelForCausalLM.from_pretrained(arguments.directory)
    settings = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, settings)
    tuned.print_trainable_parameters()
    tuned.train()

    batches = load_calibration(arguments.texts, tokenizer, max_length=arguments.tokens)
    rows = torch.cat([batch.input_ids for batch in batches])
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-3)
    losses = []
    for step in range(arguments.steps):
        picked = rows[step % len(rows)][None].to(tuned.device)
        loss = tuned(input_ids=picked, labels=picked).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
    tuned.save_pretrained(arguments.adapter)
    return losses


if __name__ == "__main__":
    main()
