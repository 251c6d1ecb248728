"""Putting new files in the place of old ones: whole directories by their names, in one step
where the kernel can, or file by file, undone on errors."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import sys
from pathlib import Path

from awq.checkpoint.contents import names_of_model
from awq.checkpoint.flush import flush_one

logger = logging.getLogger("awq.checkpoint")

_EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h
_CURRENT_FOLDER = -100  # AT_FDCWD


def exchange_directories(work: Path, target: Path) -> None:
    """Puts `work` under the name `target`; what was there is under the name `work` afterwards."""
    if not target.exists():
        work.rename(target)
    elif not swap_in_one_step(work, target):
        old = work.with_suffix(".awq-old")
        target.rename(old)
        try:
            work.rename(target)
        except BaseException:
            old.rename(target)
            raise

        flush_one(target.parent)
        remove_work(old)
    flush_one(target.parent)


def swap_in_one_step(first: Path, second: Path) -> bool:
    """Exchanges two names by the kernel's own call; False where there is none."""
    if sys.platform.startswith("linux"):
        call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    else:
        call = None

    if call is None:
        return False

    names = _CURRENT_FOLDER, os.fsencode(first), _CURRENT_FOLDER, os.fsencode(second)
    if call(*names, _EXCHANGE) == 0:
        return True

    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def exchange_files(work: Path, target: Path) -> None:
    """Moves the new files into a directory that keeps its place, its config last; all of it is
    undone on an error."""
    new = sorted((path.name for path in work.iterdir()), key=lambda name: name == "config.json")
    backup = work / ".before"
    backup.mkdir()

    done: list[tuple[Path, Path]] = []
    try:
        replaced = names_of_model(target).union(new)
        for name in sorted(replaced, reverse=True):
            if (target / name).exists():
                done.append((target / name, backup / name))
                (target / name).rename(backup / name)

        for name in new:
            done.append((work / name, target / name))
            (work / name).rename(target / name)

        flush_one(target)
    except BaseException:
        for before, after in reversed(done):
            if os.path.lexists(after):
                after.rename(before)
        raise


def remove_work(folder: Path) -> None:
    """Removes a folder with all of its content, folders that were copied without the right to write
    included."""
    for place, _, _ in os.walk(folder):
        os.chmod(place, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        logger.warning("%s could not be removed; it is safe to delete.", folder)
