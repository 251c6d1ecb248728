"""Launch configurations: tables measured per GPU architecture, and a rule for shapes and GPUs that
are not in them.

`<architecture>.json` holds "shapes": {"N x K": {"M": [BM, BN, split, scale_weight, warps, stages]
or null}}: the best configuration measured for up to M tokens, null where a dense weight was faster;
and "bfloat16", the same where that dtype wants another. "experts" holds {"E x N x K": {"R": […]}}
for stacks of E experts and up to R pairs of a token and an expert. The shipped tables are in
`tables/`. Those of the user come before them, entry by entry: `awq tune` writes them to the folder
that the variable AWQ_KERNEL_TABLES names, or else to `awq/kernels` in the user's cache folder.
Nothing is ever tuned while a model runs.
"""

from __future__ import annotations

import json
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from awq.errors import ConfigError
from awq.kernels.packed import Shape

TABLES = Path(__file__).parent / "tables"
VARIABLE = "AWQ_KERNEL_TABLES"
SECTIONS = ("shapes", "bfloat16", "experts")
MAX_TABLE_BYTES = 10_000_000
# beyond them no GPU has the registers or the memory
MOST = {"bm": 256, "bn": 512, "split": 64, "warps": 16, "stages": 8}
# channels of a gate, then as many of up, in turn: every tile of a product holds both
GATE_INTERLEAVE = 16
# tokens; more go through a dense weight unless the table says otherwise
BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)


logger = logging.getLogger("awq.kernels")


class Config(NamedTuple):
    """How one product is launched.

    bm: tokens per program. bn: outputs per program. split: programs that share the inputs of one
    tile. scale_weight: whether the scale multiplies the weights (rounding them once, as a dense
    weight is) instead of the float32 sums.
    """

    bm: int
    bn: int
    split: int
    scale_weight: bool
    warps: int
    stages: int

    def ahead(self, in_features: int) -> int:
        """Steps whose weights are fetched before the kernel in front has ended: at most 8, and not
        more than there are."""
        blocks = -(-in_features // 128)
        return min(8, 1 << ((-(-blocks // self.split)).bit_length() - 1))


def user_tables() -> Path:
    """The folder of the user's own tables. Raises ConfigError where neither a variable nor the
    user's home names one."""
    named = os.environ.get(VARIABLE)
    cache_folder = os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named)
    try:
        return Path(cache_folder or Path.home() / ".cache") / "awq" / "kernels"
    except RuntimeError as error:  # no HOME, and a user whom the system does not know
        raise ConfigError(
            f"the user has no home folder for tables of kernels ({error}); set {VARIABLE} to a "
            "folder."
        ) from error


def section(dtype: torch.dtype) -> str:
    """The part of a table that is measured with a dtype."""
    return "bfloat16" if dtype == torch.bfloat16 else "shapes"


def size_of(shape: Shape) -> str:
    """A shape's key in a table. The group size is left out: it hardly changes what is fastest."""
    return f"{shape.out_features}x{shape.in_features}"


def size_of_experts(shape: Shape, experts: int) -> str:
    """The key of a stack of experts in a table."""
    return f"{experts}x{size_of(shape)}"


@cache
def expert_table(architecture: str) -> dict[str, dict[int, Config | None]]:
    """Configurations of an architecture by "E x N x K" and pairs of a token and an expert."""
    found: dict[str, dict[int, Config | None]] = {}
    for parts in (_read(TABLES / f"{architecture}.json"), _users(architecture)):
        for size, rows in parts.get("experts", {}).items():
            found.setdefault(size, {}).update(rows)
    return found


@cache
def table(
    architecture: str, dtype: torch.dtype = torch.float16
) -> dict[str, dict[int, Config | None]]:
    """Configurations of an architecture ("sm90", "gfx942") by "N x K" and tokens; empty when it was
    never measured.

    A table of the user's that cannot be read is one warning: it may only make products faster, so
    they go on without it.
    """
    found: dict[str, dict[int, Config | None]] = {}
    for parts in (_read(TABLES / f"{architecture}.json"), _users(architecture)):
        for name in ("shapes", section(dtype)):
            for size, rows in parts.get(name, {}).items():
                found.setdefault(size, {}).update(rows)
    return found


@cache
def _users(architecture: str) -> dict[str, dict[str, dict[int, Config | None]]]:
    """The user's own table; empty, with a warning, when something is wrong with it."""
    try:
        return _read(user_tables() / f"{architecture}.json")
    except ConfigError as error:
        logger.warning("%s The configurations that ship with the package serve.", error)
        return {}


def _read(path: Path) -> dict[str, dict[str, dict[int, Config | None]]]:
    """The parts of a table, empty where there is no file. Raises ConfigError when it is none, with
    the reason."""
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise ValueError(f"more than {MAX_TABLE_BYTES:,} bytes")

        parts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: {
                size: {int(m): row and _checked(*row) for m, row in rows.items()}
                for size, rows in parts.get(name, {}).items()
            }
            for name in SECTIONS
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is no table of launch configurations ({type(error).__name__}: {error}); "
            "delete it, or write it anew with `awq tune`."
        ) from error


def _checked(bm: int, bn: int, split: int, scale_weight: bool, warps: int, stages: int) -> Config:
    config = Config(bm, bn, split, scale_weight, warps, stages)
    sizes = {name: value for name, value in config._asdict().items() if name != "scale_weight"}
    within = all(
        isinstance(value, int) and 1 <= value <= MOST[name] for name, value in sizes.items()
    )
    if (
        not within
        or scale_weight not in (False, True)
        or any(value & (value - 1) for value in (bm, bn, warps))
    ):
        raise ValueError(f"{list(config)} is no configuration")
    return config


def config_for(
    architecture: str,
    multiprocessors: int,
    shape: Shape,
    tokens: int,
    dtype: torch.dtype = torch.float16,
) -> Config | None:
    """The configuration for a product of `tokens` rows; None when a dense weight is better."""
    measured = table(architecture, dtype).get(size_of(shape), {})
    bucket = min((m for m in measured if m >= tokens), default=None)
    if bucket is not None and bucket <= min((b for b in BUCKETS if b >= tokens), default=bucket):
        return measured[bucket]  # what was measured for many more tokens says little
    return rule(architecture, multiprocessors, shape, tokens)


def rule(architecture: str, multiprocessors: int, shape: Shape, tokens: int) -> Config | None:
    """What the measured tables have in common: tiles as small as the tokens allow, and two programs
    or more per processor."""
    bucket = next((b for b in BUCKETS if b >= tokens), None)
    if bucket is None or bucket > 256:
        return None

    bm = min(bucket, 128)
    if bucket >= 128:
        bn = 128
        warps = 8
        stages = 3
    elif bucket > 8:
        bn = 64
        warps = 4
        stages = 4
    else:
        bn = 64
        warps = 2
        stages = 4

    if architecture.startswith("gfx"):
        # AMD's matrix instructions take 16 tokens and more; CDNA 3 has room for two stages. RDNA
        # spills with larger tiles.
        bm = max(bm, 16)
        stages = 2
        if not architecture.startswith("gfx9"):
            bm = min(bm, 32)
            bn = 32
            warps = 4
    elif architecture in ("sm100", "sm103") and bm <= 16:
        # fewer rows than the tensor memory path of these GPUs takes, which costs 2.5 times the
        # instructions
        bn = 32
        warps = 2

    bm = max(bm, 8)
    tiles = -(-shape.out_features // bn) * -(-tokens // bm)
    steps = -(-shape.in_features // 128)

    # more sums of large tiles do not fit the registers at the end
    split = 1
    most = 16 if bm < 64 else 8 if bm < 128 else 4
    while (
        tiles * split < (2 if bm >= 64 else 4) * multiprocessors
        and split < most
        and steps // (2 * split) >= 2
    ):
        split *= 2

    return Config(bm, bn, split, bm >= 128, warps, stages)


def config_for_experts(
    architecture: str,
    multiprocessors: int,
    shape: Shape,
    rows: int,
    experts: int,
) -> Config:
    """The configuration for `rows` pairs of a token and an expert, spread over `experts` weights of
    `shape`: what was measured for as many pairs or at most twice as many, or else by a rule."""
    measured = expert_table(architecture).get(size_of_experts(shape, experts), {})
    bucket = min((r for r in measured if rows <= r <= 2 * rows), default=None)
    config = None if bucket is None else measured[bucket]
    return config or rule_for_experts(architecture, multiprocessors, shape, rows, experts)


def rule_for_experts(
    architecture: str,
    multiprocessors: int,
    shape: Shape,
    rows: int,
    experts: int,
) -> Config:
    """The configuration where nothing was measured.

    Blocks hold the mean number of rows of an expert that has any. Experts with more take several,
    which read the same weights out of the L2 cache; larger blocks, mostly empty, were slower.
    """
    active = min(experts, rows)
    mean = rows / active
    bm = 128 if mean >= 128 else 64 if mean > 32 else next(b for b in BUCKETS[1:] if b >= mean)
    outputs = shape.out_features * active
    steps = -(-shape.in_features // 128)
    if architecture.startswith("gfx") or architecture in ("sm100", "sm103"):
        config = rule(
            architecture, multiprocessors, Shape(shape.in_features, outputs, shape.group_size), bm
        )
        assert config is not None

        # RDNA's registers hold no second stage beside an expert's rows: Triton 3.6 spills there
        one_stage = architecture.startswith("gfx") and not architecture.startswith("gfx9")
        return config._replace(stages=1) if one_stage else config

    split = 1
    tiles = -(-outputs // 128)
    # so many programs run at once: a second wave costs more than longer ones
    while (
        bm <= 32
        and tiles * split < 3 * multiprocessors
        and 2 * tiles * split <= 4 * multiprocessors
        and split < 16
        and steps // (2 * split) >= 2
    ):
        split *= 2

    # without Hopper's instructions, 4 warps have too few registers
    warps = 8 if bm == 128 and architecture != "sm90" else 4
    return Config(bm, 128, split, bm >= 64, warps, 6 if bm == 8 else 3)
