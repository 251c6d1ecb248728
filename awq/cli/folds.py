"""Show which scales can be folded where in a full-precision model, found and proven on the model
itself."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="local directory or hub id of a full-precision model")
    parser.add_argument("--seed", type=int, default=0, help="of the random scales in the proof")


def run(arguments: argparse.Namespace) -> None:
    from awq import AutoAWQForCausalLM
    from awq.cli.output import show
    from awq.folds.find import find_folds

    model = AutoAWQForCausalLM.from_pretrained(arguments.model, torch_dtype="float32").model
    rows: dict[tuple, dict[str, Any]] = {}
    for block, groups in find_folds(model, arguments.seed):
        for group in groups:
            fold = group.fold.describe() if group.fold else None
            row: dict[str, Any] = {
                "linears": list(group.consumers),
                "in_features": group.in_features,
                "fold": fold,
                "reason": None if fold else group.reason,
                "blocks": [],
            }
            rows.setdefault((group.consumers, fold), row)["blocks"].append(block)

    lines = ["| blocks | linears that read one tensor | fold |", "|---|---|---|"]
    for row in rows.values():
        if len(row["blocks"]) == 1:
            blocks = row["blocks"][0]
        else:
            blocks = f"{row['blocks'][0]} … {row['blocks'][-1]} ({len(row['blocks'])})"
        lines.append(
            f"| {blocks} | {', '.join(row['linears'])} | {row['fold'] or '— ' + row['reason']} |"
        )

    show(
        {"model": arguments.model, "groups": list(rows.values())}, arguments.json, "\n".join(lines)
    )
