"""Writing a directory whole or not at all, and losing nothing of the user's.

A save writes into a temporary sibling, carries over what stays, flushes everything to the disk, and
only then exchanges the two directories, in one step where the kernel can (`renameat2`). What was
there before is removed last. Whoever is killed, or loses power, at any moment finds the old
directory or the new one under the name, and the user's files in it.

What stays of an existing directory is what no reader of models interprets. All files of the older
model go (weights, tokenizer, templates, modules), so that a save over a directory gives what a save
into nothing gives.

A temporary folder is locked by the process that writes it. One that nobody holds was left by a run
that died: the next save to the same name removes it and says so, or puts it back where a run died
between two renames.

Where a directory cannot be renamed (a mount point, the current directory, a parent that is not
writable), the work lies inside it and files are exchanged one by one: undone on errors, though not
in one step.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from awq.checkpoint.companions import is_temporary
from awq.checkpoint.contents import is_model_file, keep_users_files
from awq.checkpoint.exchange import exchange_directories, exchange_files, remove_work
from awq.checkpoint.flush import flush_all, flush_one
from awq.errors import AwqError, CheckpointError, ConfigError

logger = logging.getLogger("awq.checkpoint")

MAX_NAME_BYTES = 255
MAX_TRIES = 100  # to make a folder that another save does not remove at once


def check_target(target: str | Path, source: str | Path | None = None) -> Path:
    """The absolute path of a directory to save to, proven writable; nothing is left in it.

    source: the directory that is read meanwhile. Raises ConfigError for a name that cannot be a
    directory's, CheckpointError for a place that is a file, not writable, inside the source or
    around it, or that holds parts of another model.
    """
    path = _absolute(target)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"cannot save to {path}: it is a file; give a directory.")

    if source is not None and Path(source).is_dir():
        _check_apart(path, Path(os.path.realpath(source)))
    _check_content(path)
    work, lock, made = _make_work(path)
    remove_work(work)
    os.close(lock)
    _remove_empty(made)

    return path


def _absolute(target: str | Path) -> Path:
    is_path = isinstance(target, (str, os.PathLike))
    if not is_path or not str(target):
        raise ConfigError(f"the directory to save to is {target!r}; give a path.")

    try:
        path = Path(target).expanduser().resolve()
    except (OSError, ValueError, RuntimeError) as error:
        name = str(target)
        raise ConfigError(f"{name!r} cannot be the name of a directory: {error}.") from error

    if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
        raise ConfigError(
            f"the name {path.name[:40]}… is longer than the {MAX_NAME_BYTES} bytes that file "
            "systems take."
        )
    return path


def _check_apart(target: Path, source: Path) -> None:
    if target == source:
        raise CheckpointError(
            f"{target} holds the original model (it is the source); save to another directory."
        )
    if target.is_relative_to(source):
        raise CheckpointError(
            f"{target} lies inside the source {source}; save to a directory outside it."
        )
    if source.is_relative_to(target):
        raise CheckpointError(
            f"the source {source} lies inside {target}; save to another directory."
        )


def _check_content(target: Path) -> None:
    """Refuses a directory with parts of a model and no config: what belongs to what could not be
    told."""
    if not target.is_dir() or (target / "config.json").exists() or _died_inside(target):
        return

    strange = sorted(
        path.name for path in target.iterdir() if path.is_file() and is_model_file(path.name)
    )
    if strange:
        raise CheckpointError(
            f"{target} holds {', '.join(strange[:3])} and no config.json, so they are no model of "
            "their own, but would be read "
            "as parts of the new one; move them away or save to another directory."
        )
    if (target / "adapter_config.json").exists():
        raise CheckpointError(
            f"{target} holds an adapter, which readers would apply; save to another directory."
        )


@contextmanager
def complete_directory(target: str | Path, source: str | Path | None = None) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and vanishes when it does
    not.

    source: a directory that is read meanwhile; it must lie apart. Files of an earlier model in
    `target` are replaced, all others stay. Raises what `check_target` does, and CheckpointError
    when the file system refuses (no space, no permission); `target` is then as it was.
    """
    path = check_target(target, source)
    recover(path)
    work, lock, made = _make_work(path)

    saved = False
    try:
        yield work
        _open_modes(work)
        if keeps_its_place(path):
            flush_all(work)
            exchange_files(work, path)
        else:
            keep_users_files(path, work)
            flush_all(work)
            _keep_permissions(path, work)
            exchange_directories(work, path)

        for parent in {path, path.parent, *(folder.parent for folder in made)}:
            flush_one(parent)
        saved = True
    except AwqError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"saving to {path} failed and was undone: {error}.") from error
    finally:
        remove_work(work)
        os.close(lock)
        if not saved:
            _remove_empty(made)


def recover(target: Path) -> None:
    """Tidies up what runs that died left beside `target`: an older directory is put back,
    unfinished work removed."""
    for folder in _temporary(target):
        lock = _take(folder)
        if lock is None:
            continue
        try:
            if folder.name.endswith(".awq-old") and not target.exists():
                logger.warning(
                    "%s: a save died between two renames; the directory it replaced is put back.",
                    target,
                )
                folder.rename(target)
            else:
                logger.warning("%s: removing %s, left by a save that died.", target, folder.name)
                remove_work(folder)
        finally:
            os.close(lock)


def _temporary(target: Path, inside: bool = False) -> list[Path]:
    """Temporary folders for this name, those of living processes too."""
    places = [target] if inside else [target.parent, target]
    start = _prefix(target)
    found: list[Path] = []
    for place in places:
        with suppress(FileNotFoundError, NotADirectoryError):  # not there, or not any more
            found += place.glob(f"{start}*")

    folders = [folder for folder in found if is_temporary(folder.name)]
    return [folder for folder in folders if folder.is_dir() and not folder.is_symlink()]


def _died_inside(target: Path) -> bool:
    """Whether a save died while it exchanged files in a directory that keeps its place."""
    for folder in _temporary(target, inside=True):
        lock = _take(folder)
        if lock is not None:
            os.close(lock)
            return True
    return False


def _prefix(target: Path) -> str:
    """Start of the names of temporary folders: short whatever the target's name, and the same for
    the same name."""
    return f".awq-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}-"


def _take(folder: Path) -> int | None:
    """A lock on a folder that no living process holds, or None; the system lets go of it when it
    is closed or the process dies."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def keeps_its_place(target: Path) -> bool:
    """Whether a directory must keep its place: a mount point, one we stand in, or one whose parent
    is closed to us."""
    if not target.is_dir():
        return False

    try:
        here = Path.cwd()
    except OSError:
        here = Path("/")

    closed = not os.access(target.parent, os.W_OK | os.X_OK)
    return os.path.ismount(target) or here.is_relative_to(target) or closed


def _make_work(target: Path) -> tuple[Path, int, list[Path]]:
    """A new temporary folder, the lock on it, and the folders that had to be made above it,
    innermost first."""
    home = target if keeps_its_place(target) else target.parent
    for _ in range(MAX_TRIES):
        work = home / f"{_prefix(target)}{secrets.token_hex(4)}.awq-tmp"
        try:
            made = make_folder(work)
            lock = _lock_new(work)
        except OSError as error:
            raise CheckpointError(f"cannot write beside {target}: {error}.") from error
        if lock is not None:
            return work, lock, made
    raise CheckpointError(f"cannot write beside {target}: other saves to it remove the work.")


def make_folder(folder: Path) -> list[Path]:
    """Makes a folder and those above it; returns the latter, innermost first.

    Another process may make the same ones above, find that it can write there, and remove them
    while we go down: then all are made once more. Raises OSError.
    """
    tries = 0
    while True:
        made = [parent for parent in folder.parents if not parent.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return made
        except (FileNotFoundError, FileExistsError):
            tries += 1
            if tries == MAX_TRIES:
                raise


def _lock_new(work: Path) -> int | None:
    """The lock on a folder just made; None when another save took it for a dead one's before it
    was locked, and removes it."""
    try:
        descriptor = os.open(work, os.O_RDONLY)
    except FileNotFoundError:
        return None

    if try_lock(descriptor, work) and work.exists():
        return descriptor

    os.close(descriptor)
    return None


def try_lock(descriptor: int, folder: Path) -> bool:
    """Locks a folder of ours until the descriptor is closed or the process has died; False when
    another process holds it. On a file system without locks nobody can take it, either: True."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.debug("%s cannot be locked: %s", folder, error)
    return True


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _open_modes(work: Path) -> None:
    """Gives files the permissions the user's umask allows: safetensors writes them readable by
    their owner alone."""
    allowed = work.stat().st_mode & 0o666
    for path in work.rglob("*.safetensors"):
        path.chmod(allowed)


def _keep_permissions(old: Path, new: Path) -> None:
    """Gives the new directory the mode and the group of the one it replaces: a private one stays
    private, a shared one shared."""
    if not old.is_dir():
        return

    found = old.stat()
    try:
        os.chown(new, found.st_uid, found.st_gid)
    except OSError:
        with suppress(OSError):  # one's own group may be given without being root
            os.chown(new, -1, found.st_gid)

    new.chmod(stat.S_IMODE(found.st_mode))
