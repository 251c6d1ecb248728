"""Kills a streamed quantization at random moments and resumes it: every result must be the bytes of
an uninterrupted run.

    python benchmarks/resume.py MODEL --kills 30 --group-size 16 --calib-data texts.txt
    python benchmarks/resume.py MODEL --calib-data texts.txt --full-disk /mnt/small

MODEL: a directory. Each kill is SIGKILL to a process of its own, at a moment drawn over the time
that an uninterrupted run takes; it is resumed by `awq quantize --resume OUT`, which is killed too
with a chance of one half. Processes are forked, so that no time goes into imports. Prints JSON:
kills, where they hit, and how many results are identical.

--full-disk: a folder on a file system of its own. There a run finds the disk filled by somebody
else when its first block is done, must end with an error, and is resumed when there is room again;
and while a run works, another one into the same output must be refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from awq.cli import main as main_of_awq


def start(*arguments: str) -> int:
    """The id of a new process that runs `awq`; modules are imported already."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            status = main_of_awq([*arguments, "--quiet"])
        except BaseException:
            status = 1
        os._exit(status)
    return child


def say(line: str) -> None:
    """What a long run has come to."""
    print(line, file=sys.stderr, flush=True)


def finish(child: int) -> None:
    """Waits for a process that must end well."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        raise SystemExit(f"awq ended with status {status}")


def killed(child: int, seconds: float) -> bool:
    """Kills a process after so many seconds; False when it ended before."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)  # which reaches an ended process, too, until it is waited for
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def digest(folder: Path) -> dict[str, str]:
    """File → hash, of all that an output holds but the times in its report and card."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("quantization_report.json", "README.md")
    }


def finished_blocks(work: Path) -> int | None:
    """How many blocks a killed run left; None when it left nothing."""
    state = work / "progress.json"
    return json.loads(state.read_text())["finished"] if state.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--group-size", default="16")
    parser.add_argument("--calib-data", required=True)
    parser.add_argument("--samples", default="8")
    parser.add_argument("--tokens", default="32")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full-disk", type=Path)
    given = parser.parse_args()
    import awq.models.streaming  # noqa: F401  # before processes are forked

    home = Path(tempfile.mkdtemp())
    options = ["--stream", "--group-size", given.group_size, "--calib-data", given.calib_data]
    options += ["--samples", given.samples, "--tokens", given.tokens]
    options += ["--preset", given.preset]
    begun = time.monotonic()
    finish(start("quantize", str(given.model), str(home / "whole"), *options))
    seconds = time.monotonic() - begun
    expected = digest(home / "whole")
    say(f"uninterrupted: {seconds:.1f} s, {len(expected)} files are compared")

    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "seconds_uninterrupted": round(seconds, 1),
    }
    if given.full_disk:
        result |= on_a_full_disk(given, options, expected)
        result |= beside_another_run(given, options, expected)
        wanted = result["resumed"] == "identical" == result["first_of_two"]
    else:
        result |= killed_and_resumed(given, options, expected, home, seconds)
        wanted = result["identical"] == result["kills"]
    shutil.rmtree(home)
    print(json.dumps(result))
    if not wanted:
        raise SystemExit(1)


def killed_and_resumed(
    given: argparse.Namespace,
    options: list[str],
    expected: dict[str, str],
    home: Path,
    seconds: float,
) -> dict[str, Any]:
    """Kills, each resumed. expected: `digest` of an uninterrupted run, which took `seconds`."""
    draw = random.Random(given.seed)
    left, identical, early = [], 0, 0
    while len(left) < given.kills:
        output = home / f"killed-{len(left)}"
        run = start("quantize", str(given.model), str(output), *options)
        if not killed(run, draw.uniform(0, 1) * seconds):
            shutil.rmtree(output)
            continue
        work = work_of(output)
        left.append(finished_blocks(work))
        if output.exists():  # killed behind the exchange of directories
            early += 1
        if draw.random() < 0.5 and left[-1] is not None:
            killed(start("quantize", "--resume", str(output)), draw.uniform(0, 1) * seconds)
        if (work / "run.json").exists():
            finish(start("quantize", "--resume", str(output)))
        elif not output.exists():  # nothing was kept: the same command begins anew
            finish(start("quantize", str(given.model), str(output), *options))
        same = digest(output) == expected and not work.exists()
        identical += same
        say(f"kill {len(left)}, {left[-1]} blocks: {'identical' if same else 'DIFFERENT'}")
        shutil.rmtree(output)
    return {
        "kills": len(left),
        "finished_blocks_at_kill": left,
        "killed_after_the_exchange": early,
        "identical": identical,
    }


def on_a_full_disk(
    given: argparse.Namespace, options: list[str], expected: dict[str, str]
) -> dict[str, Any]:
    """A run whose disk is full from its first finished block on, and is not later."""
    output, filler = given.full_disk / "full", given.full_disk / "filler"
    run = start("quantize", str(given.model), str(output), *options)
    wait_for_a_block(output)
    fill(filler)
    status = os.waitstatus_to_exitcode(os.waitpid(run, 0)[1])
    left = finished_blocks(work_of(output))
    appeared = output.exists()
    filler.unlink()
    finish(start("quantize", "--resume", str(output)))
    same = digest(output) == expected and not work_of(output).exists()
    shutil.rmtree(output)
    return {
        "status_on_the_full_disk": status,
        "finished_blocks": left,
        "output_appeared": appeared,
        "resumed": "identical" if same and status > 0 and not appeared else "no",
    }


def beside_another_run(
    given: argparse.Namespace, options: list[str], expected: dict[str, str]
) -> dict[str, Any]:
    """Two runs into one output: the status of the second, and the result of the first."""
    output = given.full_disk / "two"
    run = start("quantize", str(given.model), str(output), *options)
    wait_for_a_block(output)
    second = start("quantize", str(given.model), str(output), *options)
    status = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
    finish(run)
    same = digest(output) == expected
    return {
        "status_of_the_second": status,
        "first_of_two": "identical" if same and status > 0 else "no",
    }


def work_of(output: Path) -> Path:
    return output.with_name(output.name + ".awq-work")


def wait_for_a_block(output: Path) -> None:
    while not finished_blocks(work_of(output)):
        if output.exists():
            raise SystemExit("the run ended before its first block was seen; give a larger model")
        time.sleep(0.02)


def fill(path: Path) -> None:
    """Writes until the disk is full, to its last byte."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)) == 1 << 16:
            pass


if __name__ == "__main__":
    main()
