"""Prints the folds found for every family of the test zoo as a Markdown table (docs/folds.md holds its output).

PYTHONPATH=tests python benchmarks/fold_table.py [family ...]
"""

from __future__ import annotations

import sys

import torch
import zoo

from awq.folds import discover, prove
from awq.nn.blocks import find_block_lists, record_block_calls


@torch.no_grad()
def folds_of(family: str) -> list:
    """Input groups of the second block of a tiny random model (the first may differ: ModernBERT's has no norm)."""
    model = zoo.tiny_model(family)
    lists = find_block_lists(model)
    blocks = lists[0][1]
    many, single = zoo.token_batch(), {k: v.reshape(-1, 1) for k, v in zoo.token_batch(4, 16, seed=2).items()}
    h, one = record_block_calls(model, lists, [many]), record_block_calls(model, lists, [single])
    hidden, hidden_one = (c.calls[0][0][0].run(blocks[0], c.hidden[0][0]) for c in (h, one))
    calls = [(h.calls[0][0][1], hidden)]
    return prove(blocks[1], discover(blocks[1], [(one.calls[0][0][1], hidden_one)], calls), calls)


def main() -> None:
    print("| family | linears that read one tensor | fold |\n|---|---|---|")
    for family in sys.argv[1:] or zoo.FAMILIES:
        if not zoo.available(family):
            continue
        for group in folds_of(family):
            names = ", ".join(group.consumers)
            print(f"| {family} | {names} | {group.fold.describe() if group.fold else '—'} |")


if __name__ == "__main__":
    main()
