"""A cross-encoder before and after quantization: an encoder is fine-tuned on scored sentence pairs,
quantized, and asked again.

    python benchmarks/reranker.py --model all-MiniLM-L6-v2 --train sts2014-headlines.tsv --measure
    sts2014-images.tsv

Files have lines `score<TAB>sentence<TAB>sentence`, scores from 0 to 5. Calibrated on the training
pairs, measured through `CrossEncoder(saved directory)` on pairs of the other file. The head is new,
so the fine-tuning is short and the figures are no one's record: what counts is how far quantization
moves them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import common
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from awq import AutoAWQForCausalLM
from awq.evals.similarity import read_pairs, spearman


def fine_tune(arguments: argparse.Namespace, folder: Path) -> None:
    """Writes a cross-encoder with one output, trained on scores / 5."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model, num_labels=1, dtype=torch.float32
    ).train()
    scores, first, second = read_pairs(arguments.train)
    labels = torch.tensor(scores) / 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate, weight_decay=0.01)
    steps = arguments.epochs * (len(labels) // arguments.batch)
    order = torch.cat([torch.randperm(len(labels)) for _ in range(arguments.epochs)])
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = (
            arguments.rate * min(1.0, 10 * (step + 1) / steps) * (1 - step / steps)
        )
        rows = order[step * arguments.batch : (step + 1) * arguments.batch].tolist()
        inputs = tokenizer(
            [first[i] for i in rows],
            [second[i] for i in rows],
            padding=True,
            truncation=True,
            return_tensors="pt",
        )
        binary_cross_entropy_with_logits(model(**inputs).logits[:, 0], labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def predictions(directory: Path, pairs: list[tuple[str, str]]) -> torch.Tensor:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(directory), device="cpu")
    return torch.from_numpy(
        model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--measure", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--presets", nargs="*", default=["rtn", "fast", "balanced"])
    parser.add_argument("--variants", default="[]", help='JSON list of {"name": …, option: …}')
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    scores, first, second = read_pairs(arguments.measure)
    pairs = list(zip(first, second))
    _, one, other = read_pairs(arguments.train)
    with tempfile.TemporaryDirectory() as folder:
        full, quantized = Path(folder) / "full", Path(folder) / "quantized"
        start = time.perf_counter()
        fine_tune(arguments, full)
        seconds = time.perf_counter() - start
        before = predictions(full, pairs)
        rows = []
        for name, options in common.jobs(arguments.presets, arguments.variants):
            model = AutoAWQForCausalLM.from_pretrained(str(full))
            report = model.quantize(
                list(zip(one, other)),
                quant_config={"q_group_size": arguments.group_size},
                max_calib_samples=len(one),
                **options,
            )
            model.save_quantized(quantized)
            after = predictions(quantized, pairs)
            rows.append(
                {
                    "name": name,
                    "correlation": float(torch.corrcoef(torch.stack([before, after]))[0, 1]),
                    "rank_correlation": spearman(before, after),
                    "spearman_before": 100 * spearman(before, scores),
                    "spearman_after": 100 * spearman(after, scores),
                    "loss": report.loss,
                    "options": options,
                }
            )
            print(
                {k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()},
                flush=True,
            )
    if arguments.json:
        result = {
            "trained_and_calibrated_on": arguments.train.name,
            "measured_on": arguments.measure.name,
            "group_size": arguments.group_size,
            "training_seconds": seconds,
            "rows": rows,
        }
        common.write(arguments.json, "cpu", result)


if __name__ == "__main__":
    main()
