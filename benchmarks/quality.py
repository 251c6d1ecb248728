r"""Quality of quantization on a real language model, measured through the saved file: KL
divergence, flips, perplexity.

Calibrates on the first half of a text and measures perplexity on the second
(docs/notes/quality_log.md, "Protocol"):

    python benchmarks/quality.py --model DIR --text wikitext2-valid.txt --split-bytes 560313 \
        --group-size 64 --presets fast balanced --samples 128 --tokens 512 --json out.json

`--limit 16384` measures on the first 16,384 tokens only: the share of round-to-nearest's loss is
then the figure to read. `--natural` takes the form of WikiText off the text first: words as they
are written, and no sentence with an `<unk>`. `--baseline` names a result file of the same text,
whose first row is what losses are shares of; without it that is the first row of this run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tempfile
import time
from pathlib import Path

import common
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import awq
from awq.checkpoint import load_model, save_checkpoint
from awq.evals.divergence import divergence
from awq.evals.perplexity import perplexity
from awq.models.base import BaseAWQForCausalLM


def split_text(path: Path, split_bytes: int, as_written: bool = False) -> tuple[list[str], str]:
    """Paragraphs longer than 200 characters of the first `split_bytes` (up to a line end), and the
    rest as one text."""
    raw = path.read_bytes()
    cut = raw.rindex(b"\n", 0, split_bytes) + 1
    seen, held_out = raw[:cut].decode("utf-8"), raw[cut:].decode("utf-8")
    if as_written:
        seen, held_out = natural(seen), natural(held_out)
    return [p for p in map(str.strip, seen.splitlines()) if len(p) > 200], held_out


def natural(text: str) -> str:
    """WikiText's paragraphs with words and marks joined as they are written, without the sentences
    that have an <unk>."""
    found = []
    for line in (line.strip() for line in text.splitlines()):
        if len(line) < 100:
            continue  # titles and empty lines
        line = re.sub(r" @([-.,])@ ", r"\1", line)
        line = " ".join(s for s in re.split(r"(?<= [.!?]) (?=[A-Z\"])", line) if "<unk>" not in s)
        line = re.sub(r"([(\[$]) ", r"\1", re.sub(r" ([.,;:!?%)\]])", r"\1", line))
        line = re.sub(
            r'" ([^"]*?) ?"', r'"\1"', re.sub(r" (['’](?:s|t|d|m|re|ve|ll)\b)", r"\1", line)
        )
        if len(line) > 100:
            found.append(line + "\n")
    return "".join(found)


def measure(
    arguments: argparse.Namespace, name: str, settings: dict, tokenizer, texts: list[str], ids
) -> dict:
    """One row: quantize as a user does, with `settings` as its keyword arguments, save, load,
    measure."""
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).to(
        arguments.device
    )
    config = awq.AwqConfig(group_size=arguments.group_size)
    row: dict = {"name": name}
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    report = BaseAWQForCausalLM(model, arguments.model).quantize(
        tokenizer,
        config,
        calib_data=texts,
        max_calib_samples=arguments.samples,
        max_calib_seq_len=arguments.tokens,
        **settings,
    )
    row["seconds"] = time.perf_counter() - start
    if arguments.device == "cuda":
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "quantized"
        save_checkpoint(model.cpu(), target, config, report, source=arguments.model)
        del model
        row["sha256"] = weights_digest(target)
        loaded = load_model(target, dtype=torch.float32).to(arguments.device)
        row["perplexity"] = perplexity(loaded, ids, limit=arguments.limit)
        dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).to(
            arguments.device
        )
        row["divergence"] = divergence(
            dense, loaded, ids, window=2048, limit=arguments.limit
        ).to_dict()
    return row | {
        "loss": report.loss,
        "loss_rtn": report.loss_rtn,
        "phases": report.phases,
        "tuning": report.tuning,
        "options": settings,
        "warnings": report.warnings,
    }


def read_baseline(path: Path, tokens: int, full: float) -> dict:
    """The first row of a result file. Raises ValueError when it was measured on another text."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["tokens_measured"] != tokens or abs(result["full_precision"] / full - 1) > 1e-4:
        raise ValueError(
            f"{path} measured {result['tokens_measured']} tokens at {result['full_precision']:.4f},"
            f" this run {tokens} at {full:.4f}"
        )
    return result["rows"][0]


def weights_digest(directory: Path) -> str:
    """SHA-256 over the weight files in the order of their names: equal for two runs that wrote the
    same bytes."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration-text", type=Path, help="calibrate on this text instead")
    parser.add_argument("--split-bytes", type=int, default=560313)
    parser.add_argument(
        "--natural", action="store_true", help="take the form of WikiText off the text"
    )
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--presets", nargs="*", default=["rtn", "fast", "balanced"])
    parser.add_argument(
        "--variants", default="[]", help='JSON list of {"name": …, argument of quantize: …}'
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--baseline", type=Path, help="result file with round-to-nearest first")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    paragraphs, held_out = split_text(arguments.text, arguments.split_bytes, arguments.natural)
    if arguments.calibration_text:
        text = arguments.calibration_text.read_text(encoding="utf-8")
        paragraphs = [chunk for chunk in text.split("\n\n") if len(chunk) > 200]
    ids = torch.tensor(tokenizer(held_out, add_special_tokens=False, verbose=False)["input_ids"])
    dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).to(
        arguments.device
    )
    full = perplexity(dense, ids, limit=arguments.limit)
    del dense
    print(f"full precision {full:.4f}", flush=True)
    rows: list[dict] = []
    first = None
    if arguments.baseline:
        first = read_baseline(arguments.baseline, len(ids[: arguments.limit]), full)
    for name, settings in common.jobs(arguments.presets, arguments.variants):
        rows.append(measure(arguments, name, settings, tokenizer, paragraphs, ids))
        row = rows[-1]
        first = first or row
        row["share_of_rtn_loss"] = (row["perplexity"] - full) / (first["perplexity"] - full)
        moved = row["divergence"]
        print(
            f"{name:24s} KL {moved['mean_kl']:.4f}  flips {100 * moved['flips']:.2f} %  "
            f"perplexity {row['perplexity']:.4f}  "
            f"share of {first['name']}'s loss {row['share_of_rtn_loss']:.3f}  "
            f"{row['seconds']:.1f} s  {row['phases']}",
            flush=True,
        )
        if arguments.json:  # after every row: a run that is cut off keeps what it has measured
            common.write(
                arguments.json,
                arguments.device,
                {
                    "tokens_measured": len(ids[: arguments.limit]),
                    "group_size": arguments.group_size,
                    "full_precision": full,
                    "baseline": {k: first[k] for k in ("name", "perplexity")},
                    "rows": rows,
                },
            )


if __name__ == "__main__":
    main()
