"""Threads that help a caller and otherwise sleep.

The caller of a program works itself; helpers wake up, take what is left and, a moment later, go to
sleep again: the next of many short calls finds them awake. A helper that the system does not let
run in time is not waited for: its ticket is taken back. One
caller at a time has the helpers; another one that comes meanwhile works alone, which is what many
callers on few cores should do.

How many cores there are to use is asked of the system: the affinity mask, and the quota of the
control group, which says 2 where 64 cores are seen.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from functools import cache
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")  # lines "number:controllers:path"
# What a group's folder says: in version 2 "quota period" in one file, before that two files.
QUOTA_FILES = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))


def usable_cores() -> int:
    """Cores that this process may use at once: its affinity mask, bounded by the quota of its
    control group."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota())))


def _quota() -> float:
    """Cores that the process's control groups let it use on average: the least of all above it."""
    return min(map(_quota_of, group_folders("cpu")), default=math.inf)


def group_folders(controller: str) -> list[Path]:
    """Folders of the control groups that bound what this process takes of "cpu" or "memory": its
    own and those above it."""
    try:
        lines = MEMBERSHIP.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return []

    found: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            found += _upwards(CGROUPS, path)
        elif controller in controllers.split(","):
            for mount in {controllers, controller}:
                found += _upwards(CGROUPS / mount, path)

    return found


def _upwards(mount: Path, path: str) -> list[Path]:
    """A group's folder and those above it. In a container the mount itself is the process's own."""
    parts = [part for part in path.split("/") if part]
    return [mount.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _quota_of(folder: Path) -> float:
    for names in QUOTA_FILES:
        try:
            words = [word for name in names for word in (folder / name).read_text().split()]
            quota = int(words[0])
            period = int(words[1])
        except (OSError, ValueError, IndexError):  # no such file, or "max": no limit
            continue
        if quota > 0 and period > 0:
            return quota / period
    return math.inf


# A pool is int64s: the job, tickets for helpers, helpers that came back, whether to stop; a
# semaphore; helpers that look for tickets without being woken.
POOL_JOB, POOL_TICKETS, POOL_BACK, POOL_STOP, POOL_SEMAPHORE, POOL_AWAKE = 0, 8, 16, 17, 24, 32
POOL_FIELDS = 40


class Pool:
    """Helpers of one native program: `serve` is a helper's life, `call(pool, job, helpers)` a job
    with them."""

    def __init__(self, serve: int, call: int, helpers: int) -> None:
        self._memory = (ctypes.c_int64 * (POOL_FIELDS + 8))()
        address = ctypes.addressof(self._memory)
        self._address = address + -address % 64
        self._free = threading.Lock()
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(call)
        self._serve = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(serve)
        self.helpers = helpers
        if not helpers:
            return

        libc = ctypes.CDLL(None)
        if libc.sem_init(ctypes.c_void_p(self._address + 8 * POOL_SEMAPHORE), 0, 0) != 0:
            self.helpers = 0
            return
        # daemons: they hold nothing that the end of a process should wait for
        for i in range(helpers):
            threading.Thread(
                target=self._serve, args=(self._address,), name=f"awq-{i}", daemon=True
            ).start()

    def run(self, job: int, helpers: int) -> bool:
        """The job with helpers; False when another caller has them."""
        if not self._free.acquire(blocking=False):
            return False

        try:
            self._call(self._address, job, min(helpers, self.helpers))
        finally:
            self._free.release()
        return True


@cache
def helpers_for_this_process() -> int:
    """Helpers that a pool should have: every usable core but the caller's own."""
    has_semaphores = os.uname().sysname == "Linux" if hasattr(os, "uname") else False
    return cores_at_start() - 1 if has_semaphores else 0


@cache
def cores_at_start() -> int:
    return usable_cores()
