"""Quantizations that several processes divide, for `test_team.py`.

    torchrun --nproc-per-node 2 tests/team_cases.py MODELS OUTPUTS

Each model of MODELS goes into OUTPUTS/name from memory and into OUTPUTS/name-streamed. Pieces are
made small, so that tiny models have several of each. Without torchrun one process does it all.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from awq import AutoAWQForCausalLM, quantize_directory
from awq.core import rounding, scales
from awq.core.team import ALONE, several_processes, was_started_in_a_team
from awq.quantize import group, input_error, run, statistics

# model → preset, and how many values of the original's inputs are kept
CASES = {
    "llama": ("balanced", 1 << 29),
    "again": ("balanced", 0),
    "mixture": ("balanced", 1 << 29),
    "encoder": ("fast", 1 << 29),
    "encoder_decoder": ("balanced", 1 << 29),
}


def main(models: Path, outputs: Path) -> None:
    statistics.PANEL = statistics.NARROW_PANEL = 24  # no divisor of the widths
    group.ROUNDED_VALUES["cpu"] = 1 << 9
    rounding.COLUMNS = 6
    scales._TOGETHER["cpu"] = 1 << 12
    run.BATCH_TOKENS = 32
    ids = torch.randint(3, 60, (10, 16), generator=torch.Generator().manual_seed(1))
    with several_processes() if was_started_in_a_team() else nullcontext(ALONE) as team:
        for name, (preset, input_error.MAX_KEPT_VALUES) in CASES.items():
            given = dict(preset=preset, progress=False)
            settings = {"q_group_size": 16}
            model = AutoAWQForCausalLM.from_pretrained(str(models / name))
            model.quantize(ids, quant_config=settings, **given)
            if team.rank == 0:
                model.save_quantized(outputs / name)
            quantize_directory(models / name, outputs / f"{name}-streamed", settings, ids, **given)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
