"""Launch configurations: a table measured per GPU architecture, and a rule for shapes and GPUs that are not in it.

`tables/<architecture>.json` holds "shapes": {"N x K": {"M": [BM, BN, split, scale_weight, warps, stages] or null}}: the best
configuration measured for up to M tokens, null where a dense weight was faster. `benchmarks/kernels.py --tune` writes it.
Nothing is ever tuned while a model runs.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from awq.kernels.packed import Shape

TABLES = Path(__file__).parent / "tables"
BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512)  # tokens; more go through a dense weight unless the table says otherwise


class Config(NamedTuple):
    """How one product is launched.

    bm: tokens per program. bn: outputs per program. split: programs that share the inputs of one tile. scale_weight: whether
    the scale multiplies the weights (rounding them once, as a dense weight is) instead of the float32 sums.
    """

    bm: int
    bn: int
    split: int
    scale_weight: bool
    warps: int
    stages: int

    def ahead(self, in_features: int) -> int:
        """Steps whose weights are fetched before the kernel in front has ended: at most 8, and not more than there are."""
        blocks = -(-in_features // 128)
        return min(8, 1 << ((-(-blocks // self.split)).bit_length() - 1))


@cache
def table(architecture: str) -> dict[str, dict[str, list | None]]:
    """Measured configurations of an architecture ("sm90", "gfx942"); empty when it was never measured."""
    path = TABLES / f"{architecture}.json"
    return json.loads(path.read_text(encoding="utf-8"))["shapes"] if path.is_file() else {}


def config_for(architecture: str, multiprocessors: int, shape: Shape, tokens: int) -> Config | None:
    """The configuration for a product of `tokens` rows; None when a dense weight is better."""
    measured = table(architecture).get(f"{shape.out_features}x{shape.in_features}")
    if measured is not None:
        bucket = next((b for b in sorted(map(int, measured)) if b >= tokens), None)
        found = None if bucket is None else measured[str(bucket)]
        return None if found is None else Config(*found)
    return rule(architecture, multiprocessors, shape, tokens)


def rule(architecture: str, multiprocessors: int, shape: Shape, tokens: int) -> Config | None:
    """What the measured tables have in common: tiles as small as the tokens allow, and two programs or more per processor."""
    bucket = next((b for b in BUCKETS if b >= tokens), None)
    if bucket is None or bucket > 256:
        return None
    bm, (bn, warps, stages) = min(bucket, 128), (128, 8, 3) if bucket >= 128 else (64, 4, 4) if bucket > 8 else (64, 2, 4)
    if architecture.startswith("gfx"):
        # AMD's matrix instructions take 16 tokens and more; CDNA 3 has room for two stages. RDNA spills with larger tiles.
        bm, stages = max(bm, 16), 2
        if not architecture.startswith("gfx9"):
            bm, (bn, warps) = min(bm, 32), (32, 4)
    elif architecture in ("sm100", "sm103") and bm <= 16:
        bn, warps = 32, 2  # fewer rows than the tensor memory path of these GPUs takes, which costs 2.5 times the instructions
    bm = max(bm, 8)
    tiles = -(-shape.out_features // bn) * -(-tokens // bm)
    steps = -(-shape.in_features // 128)
    split, most = 1, 16 if bm < 64 else 8 if bm < 128 else 4  # more sums of large tiles do not fit the registers at the end
    while tiles * split < (2 if bm >= 64 else 4) * multiprocessors and split < most and steps // (2 * split) >= 2:
        split *= 2
    return Config(bm, bn, split, bm >= 128, warps, stages)


def config_for_experts(architecture: str, multiprocessors: int, shape: Shape, rows: int, experts: int) -> Config:
    """The configuration for `rows` pairs of a token and an expert, spread over `experts` weights of `shape`.

    Blocks hold what most experts get when tokens choose at random: the mean and two standard deviations. Many rows go in
    blocks of 64 or 128, several to an expert, because a block that is not full costs as much as a full one.
    """
    active = min(experts, rows)
    mean = rows / active
    bm = 128 if mean >= 512 else 64 if mean > 32 else next(b for b in BUCKETS[1:] if b >= mean + 2 * (mean - 1) ** 0.5)
    config = rule(architecture, multiprocessors, Shape(shape.in_features, shape.out_features * active, shape.group_size), bm)
    assert config is not None
    return config
