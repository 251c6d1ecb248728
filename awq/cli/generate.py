"""Generate text with a quantized language model."""

from __future__ import annotations

import argparse
import logging

from awq.cli.arguments import add_device, positive

logger = logging.getLogger("awq.cli")

_NO_TEXT = (
    "the model ended without a word; one that was trained on chats wants --chat, or `awq chat`."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="quantized directory or hub id")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=positive, default=64, help="at most so many")
    parser.add_argument(
        "--chat", action="store_true", help="wrap the prompt in the model's chat template"
    )
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    from transformers import TextStreamer

    from awq import AutoAWQForCausalLM
    from awq.calibration.templates import apply_chat_template
    from awq.cli.output import show
    from awq.errors import ModelError
    from awq.nn.model_code import model_code

    model = AutoAWQForCausalLM.from_quantized(arguments.model, device=arguments.device)
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ModelError(f"{arguments.model} has no tokenizer.")

    prompt = arguments.prompt
    if arguments.chat:
        chat = [{"role": "user", "content": prompt}]
        prompt = apply_chat_template(tokenizer, chat, tokenize=False, add_generation_prompt=True)

    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if arguments.json:
        streamer = None
    else:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    with model_code(arguments.model):
        out = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, streamer=streamer)
    new = out[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    if arguments.json:
        show({"prompt": arguments.prompt, "text": text, "new_tokens": len(new)}, True)
    if not text.strip():
        logger.warning(_NO_TEXT)
