"""The folder in which a streamed quantization keeps what is finished, beside its output."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from awq.checkpoint.directory import check_target, keeps_its_place
from awq.errors import CheckpointError

ENDING = ".awq-work"


def place_of(target: str | Path) -> Path:
    """The work folder of an output directory: beside it, or inside where its parent is closed."""
    path = check_target(target)
    return path / ENDING if keeps_its_place(path) else path.with_name(path.name + ENDING)


@contextmanager
def work_folder(target: str | Path) -> Iterator[Path]:
    """A folder that one process at a time has; it is removed at the end.

    Raises CheckpointError when another process is at work for the same output, or when nothing can
    be written there.
    """
    folder = place_of(target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"cannot write beside {target}: {error}.") from error
    try:
        _lock(descriptor, folder)
        try:
            for old in folder.iterdir():
                old.unlink()  # of a run that died
            yield folder
        finally:
            shutil.rmtree(folder)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    """Until the descriptor is closed, or the process has died."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(
            f"another process is quantizing into {folder.with_suffix('')}; wait for it, or give "
            "another output."
        ) from error
    except OSError:  # a file system without locks
        return
