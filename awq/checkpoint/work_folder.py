"""The folder in which a streamed quantization keeps what is finished, beside its output.

    OUTPUT.awq-work/
        run.json                        what this is: the arguments and all that decides the result
        block-00000.safetensors …       finished blocks, under the names of the output
        runs-again-00000.safetensors …  the same under the model's names: encoders before decoders
        progress.json                   how far it got, and the report so far
        hidden-00012-00000.safetensors …  the hidden states before block 12, batch by batch
        activations-000-000000 …        those that found no room in memory, while the run lasts

Every file is on the disk, whole, before it has its name, and `progress.json` is replaced last. So
whoever is killed at any moment finds an older state that is complete. Blocks that were finished
after that state are worked on again and come out the same.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from awq.checkpoint.directory import check_target, keeps_its_place, make_folder, try_lock
from awq.checkpoint.files import read_json
from awq.checkpoint.flush import flush_one
from awq.errors import AwqError, CheckpointError
from awq.nn.hidden import ACTIVATIONS
from awq.nn.presence import Progress

logger = logging.getLogger("awq.checkpoint")

ENDING = ".awq-work"
# At most, for keeping hidden states: they are gigabytes for a large model.
SHARE_OF_TIME, NO_TIME = 0.05, 0.2  # seconds
_HASH_LENGTH = 64
_ABOUT = (
    "Finished blocks of a quantization by autoawq that has not ended. `awq quantize --resume "
    "OUTPUT` goes on; deleting this folder loses them and nothing else."
)


@dataclass
class WorkFolder:
    """A work folder that this process holds.

    target: the output's directory. arguments: of `quantize_directory`, as JSON holds them; None
    where it cannot.
    """

    path: Path
    target: Path
    arguments: dict[str, Any] | None = None
    _saved_at: float | None = None  # by the clock of `time.monotonic`
    _saving_took: float = 0.0
    _files: list[Path] = field(default_factory=list)

    # What it is

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Notes what decides about the result. Raises CheckpointError when finished blocks were
        made with other settings, and names these."""
        now = json.loads(json.dumps(settings))
        before = read_json(self.path / "run.json")["settings"] if self.has_progress else now
        if before == now:
            content = {"about": _ABOUT, "arguments": self.arguments, "settings": now}
            self._write_json("run.json", content)
            return

        names = [n for n in {**before, **now} if before.get(n) != now.get(n)]
        raise CheckpointError(
            f"{self.path} holds finished blocks of another quantization: "
            f"{_differences(names, before, now)}; go on as it was begun (`awq quantize "
            f"--resume {self.target}`), or delete {self.path} to begin anew."
        )

    # Blocks

    @property
    def blocks(self) -> list[Path]:
        """Files of the finished blocks, in the order of their visits."""
        return self._files

    def add_block(self, tensors: dict[str, Tensor], runs_again: dict[str, Tensor] | None) -> None:
        """Writes a finished block. runs_again: the same under the model's names, where it must be
        possible to load it later."""
        number = len(self._files)
        if runs_again is not None:
            self._write_tensors(f"runs-again-{number:05d}.safetensors", runs_again)
        self._files.append(self._write_tensors(f"block-{number:05d}.safetensors", tensors))

    def block_that_runs_again(self, number: int) -> dict[str, Tensor]:
        return load_file(self.path / f"runs-again-{number:05d}.safetensors")

    # Progress

    @property
    def has_progress(self) -> bool:
        return (self.path / "progress.json").exists()

    @property
    def is_due(self) -> bool:
        """Whether keeping the progress now takes no time, or a small share of it."""
        if self._saved_at is None or self._saving_took < NO_TIME:
            return True
        return self._saving_took <= SHARE_OF_TIME * (time.monotonic() - self._saved_at)

    def save_progress(self, progress: Progress) -> None:
        start = time.monotonic()
        for batch in range(max(map(len, progress.hidden.values()), default=0)):
            name = _name_of_hidden(progress.finished, batch)
            self._write_tensors(name, _batch_of(progress.hidden, batch))

        content = {
            "finished": progress.finished,
            "hidden": {name: len(tensors) for name, tensors in progress.hidden.items()},
            "quantized": progress.quantized,
            "notes": progress.notes,
        }
        self._write_json("progress.json", content)
        for old in self.path.glob("hidden-*"):
            if not old.name.startswith(_name_of_hidden(progress.finished)):
                old.unlink()

        self._saved_at = time.monotonic()
        self._saving_took = self._saved_at - start

    def load_progress(self) -> Progress | None:
        """The last one that was saved. Raises CheckpointError when its files are broken."""
        if not self.has_progress:
            return None
        try:
            content = read_json(self.path / "progress.json")
            finished, count = content["finished"], max(content["hidden"].values(), default=0)
            names = [f"block-{number:05d}.safetensors" for number in range(finished)]
            self._files = [self.path / name for name in names]
            saved = [self.path / _name_of_hidden(finished, batch) for batch in range(count)]

            for path in (*self._files, *saved):
                with safe_open(path, "pt"):  # which compares its size with its header
                    pass

            hidden: dict[str, Sequence[Tensor]] = {
                name: _SavedHidden(self.path, finished, name, count)
                for name, count in content["hidden"].items()
            }
            return Progress(finished, hidden, content["quantized"], content["notes"])
        except (OSError, SafetensorError, KeyError, TypeError, CheckpointError) as error:
            raise CheckpointError(
                f"{self.path} is broken ({error}); delete it to begin anew."
            ) from error

    # Writing

    def _write_tensors(self, name: str, tensors: dict[str, Tensor]) -> Path:
        unfinished = self.path / "unfinished"
        save_file(tensors, unfinished, metadata={"format": "pt"})
        return self._publish(unfinished, name)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        unfinished = self.path / "unfinished"
        unfinished.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
        self._publish(unfinished, name)

    def _publish(self, unfinished: Path, name: str) -> Path:
        """Gives a file its name when it is on the disk."""
        flush_one(unfinished)
        path = self.path / name
        unfinished.rename(path)
        flush_one(self.path)
        return path


class SharedWorkFolder(WorkFolder):
    """The work folder of a quantization that several processes divide, in those that do not write:
    they read what an earlier run has left."""

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Of the process that writes."""

    def add_block(self, tensors: dict[str, Tensor], runs_again: dict[str, Tensor] | None) -> None:
        """Of the process that writes."""

    @property
    def is_due(self) -> bool:
        return False


def place_of(target: str | Path) -> Path:
    """The work folder of an output directory: beside it, or inside where its parent is closed."""
    path = check_target(target)
    return path / ENDING if keeps_its_place(path) else path.with_name(path.name + ENDING)


def arguments_of(target: str | Path) -> dict[str, Any]:
    """The arguments of the run that left a work folder for this output.

    Raises CheckpointError when there is none, or when it was given data that only its caller has.
    """
    folder = place_of(target)
    if not (folder / "run.json").exists():
        raise CheckpointError(f"there is nothing to resume: {folder} does not exist.")

    arguments = read_json(folder / "run.json").get("arguments")
    if not isinstance(arguments, dict):
        raise CheckpointError(
            f"the run that left {folder} was given calibration data in memory; call "
            "quantize_directory again with the same arguments to go on."
        )
    return arguments


def folder_for(
    target: str | Path,
    arguments: dict[str, Any] | None,
    writes: bool,
) -> AbstractContextManager[WorkFolder]:
    """`work_folder` where this process is the one that writes; else that process's, to read."""
    if writes:
        return work_folder(target, arguments)
    return nullcontext(SharedWorkFolder(place_of(target), check_target(target)))


@contextmanager
def work_folder(
    target: str | Path, arguments: dict[str, Any] | None = None
) -> Iterator[WorkFolder]:
    """A folder that one process at a time has. It is removed when the block ends well, and when
    nothing in it is of use; else it stays for another run. arguments: see `WorkFolder`.

    Raises CheckpointError when another process is at work for the same output, or when nothing can
    be written there.
    """
    folder = place_of(target)
    try:
        make_folder(folder)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"cannot write beside {target}: {error}.") from error

    work = WorkFolder(folder, check_target(target), arguments)
    done = False
    try:
        if not try_lock(descriptor, folder):
            raise CheckpointError(
                f"another process is quantizing into {work.target}; wait for it, or give another "
                "output."
            )
        try:
            yield work
            done = True
        finally:
            _leave(work, done)
    except AwqError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"working in {folder} failed: {error}.") from error
    finally:
        os.close(descriptor)


def _leave(work: WorkFolder, done: bool) -> None:
    if done or not work.has_progress:
        # First what a next run would go on from: no broken state is left if this is cut short.
        (work.path / "progress.json").unlink(missing_ok=True)
        shutil.rmtree(work.path)
        return

    for left in (work.path / "unfinished", *work.path.glob(f"{ACTIVATIONS}*")):
        left.unlink(missing_ok=True)
    logger.warning(
        "finished blocks are kept in %s; `awq quantize --resume %s` goes on.",
        work.path,
        work.target,
    )


def _name_of_hidden(finished: int, batch: int | None = None) -> str:
    """Of the file that holds the hidden states of one batch; without a batch, how all begin."""
    start = f"hidden-{finished:05d}-"
    return start if batch is None else f"{start}{batch:05d}.safetensors"


def _batch_of(hidden: Mapping[str, Sequence[Tensor]], batch: int) -> dict[str, Tensor]:
    return {
        name: tensors[batch].contiguous()
        for name, tensors in hidden.items()
        if batch < len(tensors)
    }


class _SavedHidden(Sequence[Tensor]):
    """The hidden states of one name, each read from its file when it is asked for."""

    def __init__(self, folder: Path, finished: int, name: str, count: int) -> None:
        self._paths = [folder / _name_of_hidden(finished, batch) for batch in range(count)]
        self._name = name

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, batch: Any) -> Any:
        with safe_open(self._paths[batch], "pt") as file:
            return file.get_tensor(self._name)


def _differences(names: list[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What changed, in words; hashes say nothing to people."""
    words = []
    for name in names:
        values = [before.get(name), now.get(name)]
        if any(isinstance(value, str) and len(value) == _HASH_LENGTH for value in values):
            words.append(f"the {name} changed")
        else:
            words.append(f"{name} was {values[0]}, is {values[1]}")
    return ", ".join(words)
