"""Calibration of experts that few tokens reach, measured on a mixture that is really trained.

A tiny Mixtral is trained for some minutes on the bundled text, byte by byte and without a loss that
balances its experts, so that its routing is skewed as in large mixtures. It is quantized with
nearest rounding, `fast` and `balanced`, and `balanced` with other rules for what an expert's codes
are chosen for:

- routed: only the expert's own tokens;
- borrow: the package's rule, missing tokens are borrowed from the layer;
- all: every expert sees every token, as llm-compressor's `moe_calibrate_all_experts` does;

the first two with the router's weight to the power 0 (tokens count alike), 1 and 2. Judged on
held-out text: loss in nats per byte, and the Kullback-Leibler divergence from the dense model,
which shows less noise.

With --from plain all calibration rows are English or code (bytes of ASCII), so that held-out text
in other scripts reaches experts that calibration did not: what borrowing is for. The divergence is
told for both kinds of text.

    python benchmarks/experts.py [--minutes 2] [--rows 8 32 128] [--from plain] [--seeds 2 3 4]
    [--out benchmarks/results/experts.json]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from common import ROUND_TO_NEAREST, write
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from awq.calibration import CalibrationBatch
from awq.calibration.sources import bundled_texts
from awq.config import AwqConfig
from awq.quantize import QuantizeOptions, quantize_model
from awq.quantize import experts as rules
from awq.quantize.statistics import InputStatistics

LENGTH, BATCH = 64, 16
HELD_OUT_ROWS = 128
# shares of bytes of ASCII: from here on a row is plain, and up to there it is of another script
PLAIN, OTHER = 0.98, 0.7
SIZES = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=16,
    num_experts_per_tok=2,
    max_position_embeddings=LENGTH,
    tie_word_embeddings=True,
)


def rows_of_text() -> tuple[Tensor, Tensor]:
    """(training, held out): int64 [rows, LENGTH] of bytes. Every tenth text is held out whole."""
    parts = []
    for keep in (lambda i: i % 10 != 0, lambda i: i % 10 == 0):
        text = "\n\n".join(t for i, t in enumerate(bundled_texts()) if keep(i))
        data = torch.tensor(list(text.encode()))
        parts.append(data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH))
    order = torch.randperm(len(parts[1]), generator=torch.Generator().manual_seed(1))
    return parts[0], parts[1][order[:HELD_OUT_ROWS]]


def train(rows: Tensor, minutes: float) -> MixtralForCausalLM:
    """A model trained for some minutes of processor time."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    start, generator, steps = time.process_time(), torch.Generator().manual_seed(0), 0
    while time.process_time() - start < 60 * minutes:
        progress = (time.process_time() - start) / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - progress) * min(1.0, (steps + 1) / 20)
        ids = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if steps % 200 == 0:
            print(f"step {steps}: {loss.item():.3f}", flush=True)
    print(f"{steps} steps, last loss {loss.item():.3f} nats per byte")
    return model.eval()


@torch.no_grad()
def logits_of(model: MixtralForCausalLM, rows: Tensor) -> Tensor:
    """float32 [rows, LENGTH, 256]."""
    return torch.cat([model(part).logits for part in rows.split(BATCH)])


def share_of_ascii(rows: Tensor) -> Tensor:
    """Of each row of bytes, float [rows]."""
    return (rows < 128).float().mean(1)


def judge(logits: Tensor, dense: Tensor, rows: Tensor) -> dict[str, float]:
    """loss and divergence over all rows, and the divergence of plain rows and of other scripts."""
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    divergence = (
        F.kl_div(logits.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none")
        .sum(-1)
        .mean(1)
    )
    share = share_of_ascii(rows)
    return {
        "loss": float(loss),
        "kl": float(divergence.mean()),
        "kl_plain": float(divergence[share >= PLAIN].mean()),
        "kl_other": float(divergence[share <= OTHER].mean()),
    }


@contextmanager
def rule(name: str, power: float):
    """Another rule for the experts' statistics, for a while."""
    kind = rules.RoutedStatistics
    kept = rules.WEIGHT_POWER, kind.wanted, kind.borrow
    rules.WEIGHT_POWER = power
    if name == "routed":
        kind.wanted = property(lambda self: 0)
    if name == "all":
        kind.wanted = property(lambda self: 1 << 40)
        kind.borrow = _replace
    try:
        yield
    finally:
        rules.WEIGHT_POWER, kind.wanted, kind.borrow = kept


def _replace(self: rules.RoutedStatistics, layer: InputStatistics) -> int:
    """All of the layer's tokens instead of the expert's own."""
    for name in ("gram", "sum", "abs_sum"):
        getattr(self, name).copy_(getattr(layer, name))
    self._counts[0] = layer.tokens
    return layer.tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="of processor time for training")
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[8, 32, 128],
        help=f"calibration rows of {LENGTH} tokens",
    )
    parser.add_argument(
        "--from",
        dest="source",
        choices=["all", "plain"],
        default="all",
        help="text to calibrate on",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[2], help="of the choice of rows")
    parser.add_argument("--powers", type=float, nargs="+", default=[0, 1, 2])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument(
        "--model", type=Path, help="a file to keep the trained weights in, or to take them from"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows, held_out = rows_of_text()
    if args.model and args.model.exists():
        model = MixtralForCausalLM(MixtralConfig(**SIZES)).eval()
        model.load_state_dict(torch.load(args.model))
    else:
        model = train(rows, args.minutes)
        if args.model:
            torch.save(model.state_dict(), args.model)
    dense = logits_of(model, held_out)
    results = {"dense": judge(dense, dense, held_out)}
    print("dense", results["dense"])
    jobs = [
        ("nearest", ROUND_TO_NEAREST, None),
        ("fast", {"preset": "fast"}, None),
        ("balanced", {}, None),
    ]
    jobs += [
        (f"{name}, weight^{power}", {}, (name, power))
        for name in ("routed", "borrow")
        for power in args.powers
    ]
    jobs += [("all", {}, ("all", 0))]
    config = AwqConfig(group_size=args.group_size)
    source = rows if args.source == "all" else rows[share_of_ascii(rows) >= PLAIN]
    for seed, count in itertools.product(args.seeds, args.rows):
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
        picked = source[order[:count]]
        batches = [CalibrationBatch(picked, torch.ones_like(picked))]
        for name, options, chosen in jobs:
            quantized = copy.deepcopy(model)
            with rule(*(chosen or ("borrow", rules.WEIGHT_POWER))):
                report = quantize_model(
                    quantized, batches, config, QuantizeOptions(**options, progress=False)
                )
            found = judge(logits_of(quantized, held_out), dense, held_out)
            tokens = [n for layer in report.experts.values() for n in layer.routed]
            found |= {"fewest_tokens": min(tokens), "most_tokens": max(tokens)}
            results[f"seed {seed}, {count} rows, {name}"] = found
            print(
                f"{seed} {count:3} rows  {name:18} loss {found['loss']:.4f}  KL {found['kl']:.5f}  "
                f"plain {found['kl_plain']:.5f}  other {found['kl_other']:.5f}  "
                f"tokens {min(tokens)}–{max(tokens)}",
                flush=True,
            )
    if args.out:
        write(
            args.out,
            "cpu",
            {
                "minutes": args.minutes,
                "group_size": args.group_size,
                "calibrated_on": args.source,
                "results": results,
            },
        )


if __name__ == "__main__":
    main()
