"""Whether this process may use the CPU's matrix unit for bytes (AMX).

Linux keeps its registers, 8 KB a thread, only for processes that ask for them once.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache

from awq.native.machine import binding

FEATURES = ("amx-tile", "amx-int8", "avx512vl", "avx512bw")
_ARCH_PRCTL = 158  # of x86-64
_ARCH_REQ_XCOMP_PERM = 0x1023
_TILE_DATA = 18  # number of the tiles' registers among all of a thread's


@cache
def is_usable() -> bool:
    """Asks for it, where there is one."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False

    found = binding().get_host_cpu_features()
    if not all(found.get(name) for name in FEATURES):
        return False

    answer = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILE_DATA)
    return answer == 0
