"""How many threads a kernel of torch's own pool takes."""

from __future__ import annotations

import torch

from awq.native.pool import cores_at_start


def team_size() -> int:
    """Threads for a kernel: torch's, but no more than there are cores for."""
    return min(torch.get_num_threads(), cores_at_start())
