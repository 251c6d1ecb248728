"""Generates with a quantized model: one prompt as a stream, then several prompts at once.

python examples/inference.py DIRECTORY "Where are you?" "Name a river."
"""

from __future__ import annotations

import argparse

from transformers import TextStreamer

from awq import AutoAWQForCausalLM


def main(argv: list[str] | None = None) -> list[str]:
    """Returns the continuations of all prompts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args(argv)

    model = AutoAWQForCausalLM.from_quantized(
        arguments.directory,
        fuse_layers=True,
        max_seq_len=2048,
        batch_size=len(arguments.prompts),
    )
    tokenizer = model.tokenizer
    print(f"generation: {model.fuse() and model.fusion}")

    first = tokenizer(arguments.prompts[0], return_tensors="pt").to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    model.generate(**first, streamer=streamer, max_new_tokens=arguments.max_new_tokens)

    # Rows of different lengths are padded on the left, so that all of them end where text begins.
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(arguments.prompts, padding=True, return_tensors="pt").to(model.device)
    out = model.generate(**batch, max_new_tokens=arguments.max_new_tokens)
    answers = tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    for prompt, answer in zip(arguments.prompts, answers):
        print(f"{prompt} → {answer}")
    return answers


if __name__ == "__main__":
    main()
