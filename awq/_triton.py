"""Whether Triton, an optional dependency, runs on a device. Every kernel of the house asks here
before it is imported."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

# kernels run in Python, on CPU tensors: for tests
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_OLDEST = (8, 0)  # NVIDIA compute capability
# The first release with what lets a kernel start before the one in front has ended. torch 2.8
# brings it; each release of torch works with one of Triton.
_OLDEST_RELEASE = (3, 4)


@cache
def triton_problem(device: torch.device) -> str | None:
    """Why Triton does not run there, or None. On a CPU only its interpreter runs, which the caller
    has to ask for."""
    if find_spec("triton") is None:
        return "Triton is not installed; pip install 'autoawq[kernels]'"
    if device.type == "cpu":
        return None
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _OLDEST:
        major, minor = torch.cuda.get_device_capability(device)
        return f"compute capability {major}.{minor}; Triton needs {_OLDEST[0]}.{_OLDEST[1]}"

    try:
        import triton

        release = triton.__version__
        if tuple(int(part) for part in release.split(".")[:2]) < _OLDEST_RELEASE:
            oldest = ".".join(map(str, _OLDEST_RELEASE))
            return f"Triton {release} is older than {oldest}; install torch 2.8 or later"
        # builds its driver interface, which needs a C compiler
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # whatever Triton raises here, another backend serves
        return (
            f"Triton cannot start: {type(error).__name__}: "
            f"{str(error).strip().splitlines()[-1] if str(error) else ''}"
        )

    return None
