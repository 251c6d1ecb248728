"""Killed before any file operation of a save, a conversion or a quantization that goes on: the old
directory or the new one is there, whole, with the user's files.

Each point is a process of its own that dies at its n-th operation (`os._exit` in an audit hook: no
cleaning up runs). The next run to the same name must repair what the dead one left.
`CRASH_VERBOSE=1` prints every point.
"""

import os
import sys
import traceback
from pathlib import Path

import pytest
from test_loading import packed_model

from awq.checkpoint import directory, exchange
from awq.checkpoint.directory import complete_directory
from awq.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")

CHANGES = {
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.chmod",
    "ctypes.dlsym",
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
KILLED = 9
OLD = {
    "config.json": "old",
    "model.safetensors": "old",
    "tokenizer.json": "old",
    "chat_template.jinja": "old",
}
NEW = {"config.json": "new", "model.safetensors": "new", "2_Dense/model.safetensors": "new"}
MINE = {
    "notes.txt": "mine",
    "optimizer.pt": "mine",
    "data.h5": "mine",
    "runs/1/log.txt": "mine",
    "my.ckpt": "mine",
}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def tree(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def save(target):
    with complete_directory(target) as work:
        write(work, NEW)


def changes_files(event, arguments):
    """Whether an audit event announces a change of the file system."""
    if event == "open":
        return isinstance(arguments[2], int) and bool(arguments[2] & WRITING)
    return event in CHANGES


def dies_at(point, work, after=None):
    """Whether `work` was killed at its `point`-th change of the file system; False: it ended
    before. after: a file; changes are counted from when it exists."""
    child = os.fork()
    if child == 0:
        left = point

        def hook(event, arguments):
            nonlocal left
            if changes_files(event, arguments) and (after is None or after.exists()):
                left -= 1
                if left < 0:
                    os._exit(KILLED)

        sys.addaudithook(hook)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED), status
    if os.environ.get("CRASH_VERBOSE"):
        print(f"point {point}: {'killed' if status else 'ended'}")
    return status == KILLED


@pytest.mark.parametrize(
    ("before", "one_step"), [(None, True), (MINE, True), (OLD | MINE, True), (OLD | MINE, False)]
)
def test_killed_at_every_point(tmp_path, monkeypatch, before, one_step):
    if not one_step:
        monkeypatch.setattr(exchange, "swap_in_one_step", lambda first, second: False)
    # a kill loses nothing of the system's; flushing is tested below
    monkeypatch.setattr(os, "fsync", lambda _: None)
    point, killed = 0, True
    whole = [before or {}, NEW | {k: v for k, v in (before or {}).items() if k in MINE}]
    while killed:
        home = tmp_path / str(point)
        home.mkdir()
        target = home / "q"
        if before is not None:
            write(target, before)
        killed = dies_at(point, lambda target=target: save(target))
        found = tree(target) if target.exists() else {}
        if one_step or target.exists():
            assert found in whole, point
        save(target)
        assert tree(target) == whole[1], point
        assert [p.name for p in home.iterdir()] == ["q"], point
        point += 1
    assert point > 12


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """What real savers make of one model: name → (how, the files that it makes)."""
    from awq.checkpoint import convert_checkpoint, save_checkpoint
    from awq.config import AwqConfig

    home = tmp_path_factory.mktemp("savers")
    model, config = packed_model("llama", group_size=16), AwqConfig(group_size=16)
    save_checkpoint(model, home / "source", config)
    savers = {
        "save": lambda target: save_checkpoint(model, target, config),
        "convert": lambda target: convert_checkpoint(home / "source", target, "gemv"),
    }
    for name, saver in savers.items():
        saver(home / name / "q")
    return {name: (saver, contents(home / name / "q")) for name, saver in savers.items()}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["save", "convert"])
def test_real_savers_killed(tmp_path, checkpoints, name):
    """Over an older checkpoint with the user's files: one of the two is there, whole, and the next
    save repairs. Every so manieth point; `CRASH_EVERY=1` tries all."""
    saver, new = checkpoints[name]
    every = int(os.environ.get("CRASH_EVERY", 12))
    whole = [{n: t.encode() for n, t in (OLD | MINE).items()}]
    whole.append(new | {n: t.encode() for n, t in MINE.items()})
    point, killed, seen = 0, True, []
    while killed:
        target = tmp_path / str(point) / "q"
        write(target, OLD | MINE)
        killed = dies_at(point, lambda target=target: saver(target))
        found = contents(target)
        assert found in whole, point
        seen.append(whole.index(found))
        saver(target)
        assert contents(target) == whole[1], point
        assert [p.name for p in target.parent.iterdir()] == ["q"], point
        point += every
    assert seen == sorted(seen) and {0, 1} == set(seen), "the old one first, then the new one"


@pytest.fixture(scope="module")
def quantizer(tmp_path_factory):
    """A function that quantizes into a directory, and the files that it makes."""
    pytest.importorskip("transformers.core_model_loading", reason="needs loading by parts")
    import zoo
    from test_streaming import saved

    from awq import quantize_directory

    home = tmp_path_factory.mktemp("quantizer")
    source = saved(zoo.tiny_model("llama"), home / "source")
    texts = home / "texts.txt"
    texts.write_text("the cat runs over the red house. " * 40, encoding="utf-8")
    options = dict(max_calib_samples=4, max_calib_seq_len=16, general_texts=False, progress=False)

    def run(target):
        given = ({"q_group_size": 16}, str(texts))
        quantize_directory(source, target, *given, preset="fast", **options)

    run(home / "whole" / "q")
    return run, contents(home / "whole" / "q")


def timeless(files):
    """Files by name, without the contents of those that say how long the work took."""
    timed = ("README.md", "quantization_report.json")
    return {name: None if name in timed else content for name, content in files.items()}


@pytest.mark.forks
@pytest.mark.parametrize("begun", [False, True])
def test_quantizing_killed(tmp_path, quantizer, begun):
    """A first run from one directory to another, and one that goes on where another was killed.
    The next goes on with the output alone, where the dead one had noted its arguments."""
    from awq.models.streaming import resume_quantization

    run, new = quantizer
    every = int(os.environ.get("CRASH_EVERY", 16))
    old, mine = ({n: t.encode() for n, t in files.items()} for files in (OLD | MINE, MINE))
    whole = [timeless(files) for files in (old, new | mine)]

    def go_on(target):
        known = (target.with_name("q.awq-work") / "run.json").exists()
        resume_quantization(target) if known else run(target)

    point, killed, seen = 0, True, []
    while killed:
        target = tmp_path / str(point) / "q"
        write(target, OLD | MINE)
        if begun:
            progress = target.with_name("q.awq-work") / "progress.json"
            assert dies_at(0, lambda target=target: run(target), after=progress)
        killed = dies_at(point, lambda target=target: (go_on if begun else run)(target))
        found = timeless(contents(target))
        assert found in whole, point
        seen.append(whole.index(found))
        if killed:
            go_on(target)
        assert timeless(contents(target)) == whole[1], point
        assert [p.name for p in target.parent.iterdir()] == ["q"], point
        point += every
    assert seen == sorted(seen) and {0, 1} == set(seen), "the old one first, then the new one"


def test_a_directory_that_keeps_its_place(tmp_path, monkeypatch):
    """The current directory keeps its inode; an error half way puts every file back."""
    target = tmp_path / "q"
    write(target, OLD | MINE)
    monkeypatch.chdir(target)
    inode = target.stat().st_ino
    rename, left = Path.rename, 6

    def failing(self, place):
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(5, "Input/output error")
        return rename(self, place)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(CheckpointError, match="undone"):
            save(".")
    assert tree(target) == OLD | MINE
    save(".")
    assert tree(target) == NEW | MINE and target.stat().st_ino == inode and os.listdir(".")


def test_everything_is_on_the_disk_before_names_change(tmp_path, monkeypatch):
    """Flush files and folders, exchange, flush the parent, and only then remove what was there."""
    target = tmp_path / "q"
    write(target, OLD | MINE)
    events = []
    fsync, swap, remove = os.fsync, exchange.swap_in_one_step, directory.remove_work
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (events.append(("flush", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))[1],
    )
    monkeypatch.setattr(
        exchange,
        "swap_in_one_step",
        lambda a, b: (events.append(("swap", str(a))), swap(a, b))[1],
    )
    monkeypatch.setattr(
        directory, "remove_work", lambda f: (events.append(("remove", str(f))), remove(f))[1]
    )
    save(target)
    swapped = next(i for i, (kind, _) in enumerate(events) if kind == "swap")
    work = events[swapped][1]
    flushed = {path for kind, path in events[:swapped] if kind == "flush"}
    assert {f"{work}/{name}" for name in [*NEW, *MINE]} | {
        work,
        f"{work}/2_Dense",
        f"{work}/runs/1",
    } <= flushed
    after = events[swapped + 1 :]
    assert after.index(("flush", str(tmp_path))) < next(
        i for i, (kind, _) in enumerate(after) if kind == "remove"
    )


def test_living_savers_are_left_alone(tmp_path):
    target = tmp_path / "q"
    with complete_directory(target) as first:
        write(first, NEW)
        save(target)
        assert first.is_dir()
        write(first, {"config.json": "first"})
    assert tree(target)["config.json"] == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


@pytest.mark.parametrize("name", ["", None, "a\0b", "x" * 256])
def test_names_that_no_directory_can_have(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        save(name)


def test_a_long_name_is_saved_to(tmp_path):
    save(tmp_path / ("n" * 250))
    assert tree(tmp_path / ("n" * 250)) == NEW


@pytest.mark.parametrize("place", ["source/inside", "source", "."])
def test_source_and_target_lie_apart(tmp_path, place):
    write(tmp_path / "source", OLD)
    with (
        pytest.raises(CheckpointError, match="source"),
        complete_directory(tmp_path / place, tmp_path / "source"),
    ):
        pytest.fail("work began")
    assert tree(tmp_path) == {f"source/{name}": text for name, text in OLD.items()}


@pytest.mark.parametrize(
    "files", [{"tokenizer.json": "x"}, {"adapter_config.json": "{}"}, {"model.safetensors": "x"}]
)
def test_parts_of_a_model_without_a_config_are_not_mixed_in(tmp_path, files):
    write(tmp_path / "q", files)
    with pytest.raises(CheckpointError, match="another directory"):
        save(tmp_path / "q")
    assert tree(tmp_path / "q") == files
