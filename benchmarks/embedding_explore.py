r"""Which variants of quantization bring a sentence encoder's embeddings closer: one line each, all
in memory.

    python benchmarks/embedding_explore.py --model all-MiniLM-L6-v2 \
        --calibration sts2014-headlines.tsv sts2014-OnWN.tsv \
        --measure sts2014-images.tsv --json out.json

A developer's tool for choosing defaults. "pooled" variants tune scales on the cosine of pooled
embeddings instead of on the hidden states; what was found is in docs/notes/quality.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from awq import AutoAWQForEmbedding, clean_texts
from awq.evals.similarity import read_pairs
from awq.models import embedding
from awq.quantize import match, tuning

PLAIN_DISTANCE = match.OutputMatch.distance
PLAIN_RATE = tuning.OF_EMBEDDINGS.scales


def pooled_distance(share: float) -> Callable:
    """Distance for tuning: 1 − cosine of the mean-pooled states, and `share` of the hidden states'
    relative error."""

    def distance(self: Any, index: int, training: bool = False) -> tuple[Tensor, int]:
        batch, target = self.batches[index], self.targets[index].float()
        mask = batch.attention_mask.unsqueeze(-1).float()
        hidden = self._hidden(batch).float()
        pooled = [(states * mask).sum(1) / mask.sum(1) for states in (hidden, target)]
        loss = (1 - F.cosine_similarity(*pooled)).sum()
        if share:
            error = ((hidden - target) * mask).pow(2).sum() / (target * mask).pow(2).sum()
            loss = loss + share * error * len(mask)
        return loss, len(mask)

    return distance


def variants() -> list[dict[str, Any]]:
    """name; general: bundled sentences; share: of a pooled distance; rate: of tuning; the rest are
    options of quantize."""
    tuned = {"preset": "best", "refinement": 2}
    return [
        {"name": "fast", "preset": "fast"},
        {"name": "balanced", "preset": "balanced"},
        {"name": "balanced, all bundled sentences", "preset": "balanced", "general": 100_000},
        {
            "name": "balanced, refinement 3, all",
            "preset": "balanced",
            "general": 100_000,
            "refinement": 3,
        },
        {
            "name": "balanced, correction 0.9, all",
            "preset": "balanced",
            "general": 100_000,
            "correction": 0.9,
        },
        {
            "name": "balanced, no scaling, all",
            "preset": "balanced",
            "general": 100_000,
            "scaling": False,
        },
        {"name": "best", **tuned, "tuning": 2},
        {"name": "best, all", **tuned, "tuning": 2, "general": 100_000},
        {"name": "best, all, 8 epochs", **tuned, "tuning": 8, "general": 100_000},
        {"name": "pooled, 4 epochs, all", **tuned, "tuning": 4, "general": 100_000, "share": 0.0},
        {
            "name": "pooled + 0.3 hidden, 4 epochs, all",
            **tuned,
            "tuning": 4,
            "general": 100_000,
            "share": 0.3,
        },
        {
            "name": "pooled + 0.3 hidden, 12 epochs, all",
            **tuned,
            "tuning": 12,
            "general": 100_000,
            "share": 0.3,
        },
        {
            "name": "pooled + 0.3 hidden, 12 epochs, all, rate 5e-4",
            **tuned,
            "tuning": 12,
            "general": 100_000,
            "share": 0.3,
            "rate": 5e-4,
        },
        {
            "name": "pooled + 0.3 hidden, 12 epochs, all, rate 5e-3",
            **tuned,
            "tuning": 12,
            "general": 100_000,
            "share": 0.3,
            "rate": 5e-3,
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--measure", type=Path, required=True)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    pairs = read_pairs(arguments.measure)
    measured = clean_texts([*pairs[1], *pairs[2]])
    sentences = clean_texts(
        s for path in arguments.calibration for part in read_pairs(path)[1:] for s in part
    )
    sentences = [s for s in sentences if s not in set(measured)]
    rows = []
    usual = embedding.GENERAL_SENTENCES
    for variant in variants():
        settings = dict(variant)
        name, share, rate = (
            settings.pop("name"),
            settings.pop("share", None),
            settings.pop("rate", PLAIN_RATE),
        )
        embedding.GENERAL_SENTENCES = settings.pop("general", usual)
        match.OutputMatch.distance = PLAIN_DISTANCE if share is None else pooled_distance(share)
        tuning.OF_EMBEDDINGS = replace(tuning.OF_EMBEDDINGS, scales=rate)
        model = AutoAWQForEmbedding.from_pretrained(arguments.model, torch_dtype="float32")
        model.model.to(arguments.device)
        before = model.encode(measured)
        start = time.perf_counter()
        report = model.quantize(
            texts=sentences,
            quant_config={"q_group_size": arguments.group_size},
            max_calib_samples=arguments.samples,
            evaluate=False,
            progress=False,
            **settings,
        )
        cosine = F.cosine_similarity(before, model.encode(measured))
        row = {
            "name": name,
            "mean": float(cosine.mean()),
            "min": float(cosine.min()),
            "tokens": report.tokens,
            "seconds": time.perf_counter() - start,
            "tuning": report.tuning,
        }
        rows.append(row)
        print(
            f"{name:50s} {row['mean']:.5f}  {row['min']:.4f}  {row['tokens']} tokens  "
            f"{row['seconds']:.1f} s",
            flush=True,
        )
        if arguments.json:
            measured_on = {
                "calibrated_on": [p.name for p in arguments.calibration],
                "measured_on": arguments.measure.name,
            }
            common.write(arguments.json, arguments.device, {**measured_on, "rows": rows})


if __name__ == "__main__":
    main()
