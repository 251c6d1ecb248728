"""Power is lost right after a save said that it succeeded: the disk holds the new checkpoint.

A small ext4 file system lies in a file, mounted through a loop device. What the system has written
into that file by then is the disk that a machine finds after a power loss: it is copied, mounted by
itself, which replays its journal, and read.
"""

import contextlib
import os
import shutil
import subprocess

import pytest
from test_crash import MINE, NEW, OLD, save, tree, write

SIZE = 16 << 20


@contextlib.contextmanager
def mounted(image, place):
    place.mkdir()
    done = subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, text=True)
    if done.returncode:
        place.rmdir()
        pytest.skip("needs Linux where loop devices can be mounted")
    try:
        yield place
    finally:
        os.chdir("/")
        subprocess.run(["umount", place], check=True)


@pytest.fixture
def image(tmp_path):
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs Linux with mkfs.ext4, and root")
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    subprocess.run(["mkfs.ext4", "-q", "-F", path], check=True, capture_output=True)
    return path


def after_power_loss(tmp_path, image, before, in_place=False):
    """The files of `q` on the disk at the moment when the save returned, but for what the next
    save removes: in a directory that keeps its place old files may still lie in a hidden folder."""
    with mounted(image, tmp_path / "living") as disk:
        target = disk / "q"
        if before is not None:
            write(target, before)
        os.sync()
        if in_place:
            os.chdir(target)
        save("." if in_place else target)
        shutil.copy(image, tmp_path / "dead.img")
    with mounted(tmp_path / "dead.img", tmp_path / "dead") as disk:
        found = tree(disk / "q") if (disk / "q").exists() else {}
    return {name: text for name, text in found.items() if not name.startswith(".awq-")}


@pytest.mark.parametrize("before", [None, MINE, OLD | MINE])
@pytest.mark.parametrize("in_place", [False, True])
def test_what_was_saved_is_there(tmp_path, image, before, in_place):
    if in_place and before is None:
        return  # nobody stands in a directory that does not exist
    users = {name: text for name, text in (before or {}).items() if name in MINE}
    assert after_power_loss(tmp_path, image, before, in_place) == NEW | users


def test_without_flushing_it_would_not_be(tmp_path, image, monkeypatch):
    """The harness feels what it is for: unflushed, names or contents are missing."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    assert after_power_loss(tmp_path, image, OLD | MINE) != NEW | MINE
