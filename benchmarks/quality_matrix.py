r"""Calibrated on one kind of text, used on another: KL divergence and token flips, six kinds by
six.

    python benchmarks/quality_matrix.py --model .cache/smollm2-135m --prose wikitext2-valid.txt \
        --code python_code.txt --quantizers fast balanced awq gptq --json matrix.json

Kinds: prose (the text of `--prose` without WikiText's form), code, chat and mathematics (the
model's own answers to our questions, in its chat template: what a served model reads), languages
(bundled passages in other languages than English), mix (the bundled text; calibrated on, with the
bundled chats). Each kind has a part to calibrate on and another to measure on, and the general rows
that join calibration (`general_texts`) come from the bundled passages that are never measured.
Quantizers: presets; "rtn"; "gptq", plain error feedback with min/max ranges; "awq", AutoAWQ's
algorithm (benchmarks/peers.py). All write 4-bit values of one group size: equal bytes.
"balanced:own" calibrates without general text.
"""

from __future__ import annotations

import argparse
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import common
import torch
from peers import quantize_like_autoawq
from quality import split_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from awq import AwqConfig, QuantizeOptions, load_calibration, quantize_model
from awq.calibration.batches import general_texts, with_general_rows
from awq.calibration.sources import bundled_texts
from awq.evals.divergence import divergence

ANSWERS_AT_ONCE = 256
KINDS = ("chat", "code", "mathematics", "prose", "languages", "mix")
PLAIN_FEEDBACK = {
    "preset": "balanced",
    "scaling": False,
    "clip": False,
    "refinement": 0,
    "correction": 0.0,
    "bias_correction": False,
}
OPTIONS = {"rtn": common.ROUND_TO_NEAREST, "gptq": PLAIN_FEEDBACK} | {
    p: {"preset": p} for p in ("fast", "balanced", "best")
}
QUESTIONS = (
    "Summarise in two sentences: {}",
    "What would you ask the author of this? {}",
    "Rewrite this for a child of ten: {}",
    "Continue this text with one more paragraph: {}",
    "List three facts from this text: {}",
    "Reply politely to this: {}",
)
PROBLEMS = (
    "A shop sells {a} boxes of {b} pencils each. {c} pencils are broken. How many are good? Think "
    "step by step.",
    "Solve {a}x + {b} = {c} for x. Show every step.",
    "What is the sum of all whole numbers from {a} to {c}? Explain the formula.",
    "A train travels {a} km in {b} minutes. How long does it take for {c} km? Show the "
    "calculation.",
    "Differentiate f(x) = {a}x^3 - {b}x^2 + {c}x and find where the slope is zero.",
    "What is the probability of drawing {a} red balls from {c} balls of which {b} are red? "
    "Explain.",
)


def measured(texts: list[str]) -> tuple[list[str], list[str]]:
    """(texts to calibrate on, texts to measure on), taken in turns."""
    return texts[::2], texts[1::2]


def is_english(text: str) -> bool:
    letters = [c for c in text if c.isalpha()]
    common_words = {"the", "and", "of", "to", "a", "is", "in", "it", "you"}
    foreign = sum(c > "\x7f" for c in letters) > 0.02 * len(letters)
    return len(common_words & set(text.lower().split())) >= 2 and not foreign


@torch.no_grad()
def answers(model: Any, tokenizer: Any, questions: list[str], tokens: int) -> list[str]:
    """The questions and the model's own sampled answers, in its chat template."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True
        )
        for q in questions
    ]
    tokenizer.padding_side = "left"
    found = []
    torch.manual_seed(0)
    for start in range(0, len(prompts), ANSWERS_AT_ONCE):
        part = prompts[start : start + ANSWERS_AT_ONCE]
        batch = tokenizer(part, return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(
            **batch.to(model.device),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            pad_token_id=tokenizer.pad_token_id,
        )
        for ids, mask in zip(out, batch["attention_mask"]):
            text = tokenizer.decode(ids[int((mask == 0).sum()) :])
            end = tokenizer.eos_token
            head, _, answer = text.rpartition("assistant\n")
            found.append(f"{head}assistant\n{answer.split(end)[0]}{end}\n")
    return found


def texts_of_kinds(
    arguments: argparse.Namespace, model: Any, tokenizer: Any
) -> dict[str, tuple[list[str], list[str]]]:
    """For each kind, texts to calibrate on and texts to measure on."""
    bundled = bundled_texts()
    count = arguments.conversations
    english = [p for p in bundled if is_english(p)]
    chats = [
        QUESTIONS[i % len(QUESTIONS)].format(english[i % len(english)][:300])
        for i in range(2 * count)
    ]
    problems = [
        PROBLEMS[i % len(PROBLEMS)].format(a=2 + i % 7, b=3 + 5 * i % 11, c=20 + 7 * i % 83)
        for i in range(2 * count)
    ]
    code = arguments.code.read_text(encoding="utf-8").split("\n\n")
    prose_seen, prose_rest = split_text(arguments.prose, 560313, as_written=True)
    return {
        "chat": measured(answers(model, tokenizer, chats, arguments.answer_tokens)),
        "code": (code[: len(code) // 2], code[len(code) // 2 :]),
        "mathematics": measured(answers(model, tokenizer, problems, arguments.answer_tokens)),
        "prose": (prose_seen, prose_rest.split("\n")),
        "languages": tuple([p for p in part if not is_english(p)] for part in measured(bundled)),
        "mix": measured(bundled),
    }


def quantized(
    name: str, dense: Any, own: list, joined: list, arguments: argparse.Namespace
) -> tuple[Any, float]:
    """A quantized copy of the model, and the seconds that it took."""
    model = deepcopy(dense)
    start = time.perf_counter()
    if name == "awq":
        quantize_like_autoawq(model, own, arguments.group_size)
    else:
        preset, _, alone = name.partition(":")
        options = QuantizeOptions(**OPTIONS[preset], progress=False)
        joins = options.rounding == "feedback" and preset != "gptq" and alone != "own"
        batches = joined if joins else own
        quantize_model(model, batches, AwqConfig(group_size=arguments.group_size), options)
    return model, time.perf_counter() - start


def mean_divergences(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Each quantizer's KL divergence, the mean over all it was calibrated and measured on."""
    found: dict[str, list[float]] = {}
    for row in rows:
        values = [divergence["mean_kl"] for divergence in row["measured_on"].values()]
        found.setdefault(row["quantizer"], []).extend(values)
    return {name: sum(values) / len(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--prose", type=Path, required=True)
    parser.add_argument("--code", type=Path, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument(
        "--quantizers",
        nargs="*",
        default=["rtn", "fast", "balanced", "awq", "gptq"],
        help='also "best", "balanced:own"; "rtn" needs no text and comes once',
    )
    parser.add_argument("--calibrated-on", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--measure-tokens", type=int, default=16384)
    parser.add_argument(
        "--conversations", type=int, default=192, help="for calibration, and as many to measure on"
    )
    parser.add_argument("--answer-tokens", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dense = (
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        .to(arguments.device)
        .eval()
    )
    kinds = texts_of_kinds(arguments, dense, tokenizer)
    held_out = {}
    for kind, (_, texts) in kinds.items():
        ids = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
        held_out[kind] = torch.tensor(ids[: arguments.measure_tokens])
    rows: list[dict[str, Any]] = []

    def record(name: str, calibrated_on: str, model: Any, seconds: float, tokens: int) -> None:
        row: dict[str, Any] = {
            "quantizer": name,
            "calibrated_on": calibrated_on,
            "seconds": seconds,
            "calibration_tokens": tokens,
        }
        row["measured_on"] = {
            k: divergence(dense, model, ids).to_dict() for k, ids in held_out.items()
        }
        rows.append(row)
        figures = "  ".join(
            f"{k} {v['mean_kl']:.4f}/{100 * v['flips']:.1f}%" for k, v in row["measured_on"].items()
        )
        print(f"{name:14s} on {calibrated_on:12s} {seconds:5.1f} s  {figures}", flush=True)
        if arguments.json:
            sizes = {k: len(ids) for k, ids in held_out.items()}
            common.write(
                arguments.json,
                arguments.device,
                {
                    "group_size": arguments.group_size,
                    "measured": sizes,
                    "mean_kl": mean_divergences(rows),
                    "rows": rows,
                },
            )

    if "rtn" in arguments.quantizers:
        first = load_calibration([list(range(8))] * 4)
        model, seconds = quantized("rtn", dense, first, first, arguments)
        record("rtn", "nothing", model, seconds, 0)
    limits = {"max_samples": arguments.samples, "max_length": arguments.tokens}
    for kind in arguments.calibrated_on:
        texts = kinds[kind][0]
        if kind == "mix":  # the bundled chats are part of it, in the model's own template
            texts = general_texts(tokenizer, texts)
        own = load_calibration(texts, tokenizer, **limits)
        joined = own
        if kind != "mix":
            joined = with_general_rows(own, tokenizer, arguments.samples, kinds["mix"][0])
        for name in (name for name in arguments.quantizers if name != "rtn"):
            model, seconds = quantized(name, dense, own, joined, arguments)
            record(name, kind, model, seconds, sum(int(b.attention_mask.sum()) for b in own))


if __name__ == "__main__":
    main()
