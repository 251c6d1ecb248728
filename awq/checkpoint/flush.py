"""What was written, on the disk: it is there after a loss of power."""

from __future__ import annotations

import errno
import logging
import os
import stat
from pathlib import Path

logger = logging.getLogger("awq.checkpoint")


def flush_all(folder: Path) -> None:
    """Every file and folder on the disk before their names change: a rename may outlive the
    contents otherwise."""
    for place, _, files in os.walk(folder):
        for name in files:
            path = Path(place) / name
            if stat.S_ISREG(path.lstat().st_mode) and os.access(path, os.R_OK):
                flush_one(path)
        flush_one(Path(place))


def flush_one(path: Path) -> None:
    """What a file or folder holds, on the disk; where its file system cannot do that, nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        logger.debug("%s cannot be opened to be flushed: %s", path, error)
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(descriptor)
