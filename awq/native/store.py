"""Files that this user alone writes: machine code and the weights that it works on.

What lies there is executed, so a file is used only if the folder and the file belong to this user,
nobody else may write to them, no link leads there, and the digest of name and content is right.
Anything else is passed over as if it were missing. Files are replaced as a whole, never changed;
the folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger("awq.native")

VARIABLE = "AWQ_CACHE"
OFF = "off"
MAGIC = b"awqstor1"
HEADER_BYTES = 64  # magic, digest, zeros: content begins on a cache line
MAX_BYTES = 4 << 30  # of all files; the oldest go first
PIECE = 1 << 20


def folder() -> Path | None:
    """Where files are kept; None where there is no such place or `AWQ_CACHE=off` says so."""
    named = os.environ.get(VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME")
    if named == OFF or not hasattr(os, "getuid"):
        return None
    try:
        return Path(named or Path(base or Path.home() / ".cache") / "awq" / "native")
    except RuntimeError:  # no HOME, and a user whom the system does not know
        return None


def load(name: str) -> memoryview | None:
    """The content of a file, mapped; None when there is none that may be used."""
    place = folder()
    if place is None:
        return None

    try:
        _check(os.stat(place, follow_symlinks=False), stat.S_ISDIR)
        file = os.open(place / name, os.O_RDONLY | os.O_NOFOLLOW)
    except (OSError, ValueError) as error:
        logger.debug("%s is not used: %s", name, error)
        return None

    try:
        _check(os.fstat(file), stat.S_ISREG)
        mapped = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
        _check_digest(name, file)
    except (OSError, ValueError) as error:
        logger.warning("%s is not used: %s", place / name, error)
        return None
    finally:
        os.close(file)

    return memoryview(mapped)[HEADER_BYTES:]


def save(name: str, content: bytes) -> bool:
    """Writes or replaces a file. False, with a log line, where that is not possible."""
    place = folder()
    if place is None:
        return False

    temporary = None
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check(os.stat(place, follow_symlinks=False), stat.S_ISDIR)
        _make_room(place, len(content))
        descriptor, temporary = tempfile.mkstemp(dir=place)

        with os.fdopen(descriptor, "wb") as file:
            file.write((MAGIC + _digest(name, content)).ljust(HEADER_BYTES, b"\0"))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

        os.replace(temporary, place / name)
    except (OSError, ValueError) as error:
        logger.info("%s is not kept: %s", name, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        return False

    return True


def _check(found: os.stat_result, is_kind: Callable[[int], bool]) -> None:
    """Raises ValueError for what somebody else may write, or for another kind of file."""
    if not is_kind(found.st_mode):
        raise ValueError("it is another kind of file")
    if found.st_uid != os.getuid():
        raise ValueError("it belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError("other users may write to it")


def _digest(name: str, content: bytes) -> bytes:
    found = hashlib.sha256(name.encode())
    found.update(content)
    return found.digest()


def _check_digest(name: str, file: int) -> None:
    """Reads instead of using the mapping: pages that are looked at there count as this process's
    memory. Raises ValueError."""
    header = os.pread(file, HEADER_BYTES, 0)
    found = hashlib.sha256(name.encode())
    place = HEADER_BYTES
    while piece := os.pread(file, PIECE, place):
        found.update(piece)
        place += len(piece)

    expected = MAGIC + found.digest()
    if header != expected.ljust(HEADER_BYTES, b"\0"):
        raise ValueError("its digest is wrong")


def _make_room(place: Path, size: int) -> None:
    files = [path for path in place.iterdir() if path.is_file()]
    oldest = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in files)
    total = size + sum(bytes_ for _, bytes_, _ in oldest)
    for _, bytes_, path in oldest:
        if total <= MAX_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= bytes_
