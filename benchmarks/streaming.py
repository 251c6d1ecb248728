"""Peak memory and time per block of a streamed quantization.

    python benchmarks/streaming.py --shape 13b --layers 2 --limit-gb 8
    python benchmarks/streaming.py --model DIRECTORY --in-memory

--shape: a random model of that shape, in bfloat16, one shard a layer, written to --home first; with
fewer --layers than the shape has, the JSON says so and gives the time for all of them: the first
block, in which kernels are compiled, and the mean of the others for the rest, the keeping of hidden
states included. --model: a directory, streamed; with
--in-memory it is also quantized in memory, each in a process of its own.

--plain: scales and ranges are not searched, which takes most of the time on a CPU.

--limit-gb: of address space (RLIMIT_AS) for the process that quantizes; --rss-limit-gb: of its
resident memory, mapped pages of files included: it is killed when the kernel's VmHWM has been
higher; --gpu-limit-gb: of GPU memory, by torch's allocator. --output: a directory that does not go
away; when the run ends early, the same command with --model goes on behind the last finished
block. --profile: the last block runs under torch's profiler, which makes it
somewhat slower; kernels and their times go to stderr.

The source's pages leave the cache before each run, so that reading is from disk. Token ids
are random. Peak RSS is the kernel's (`ru_maxrss`), mapped pages of files included; it goes to
stderr behind every block, too. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

SHAPES: dict[str, dict[str, int]] = {
    "tiny": dict(
        hidden_size=256, intermediate_size=768, num_attention_heads=8, num_key_value_heads=2,
        num_hidden_layers=4, vocab_size=1024,
    ),
    "1b": dict(
        hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4,
        num_hidden_layers=22, vocab_size=32000,
    ),
    "13b": dict(
        hidden_size=5120, intermediate_size=13824, num_attention_heads=40, num_key_value_heads=40,
        num_hidden_layers=40, vocab_size=32000,
    ),
    "70b": dict(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8,
        num_hidden_layers=80, vocab_size=128256,
    ),
}  # fmt: skip
GB = 1e9


def write_model(shape: str, layers: int, folder: Path) -> None:
    """A random model of a shape with so many layers, shard by shard: it is never in memory."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {**SHAPES[shape], "num_hidden_layers": layers}
    config = LlamaConfig(**sizes, max_position_embeddings=4096, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        found = re.search(r"layers\.(\d+)\.", name)
        groups.setdefault(found[1] if found else "rest", {})[name] = tuple(parameter.shape)
    weight_map = {}

    def write(number: int, tensors: dict[str, tuple[int, ...]]) -> None:
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        # The values matter little, and drawing them takes longer than writing them.
        made = {name: _random(size) * (1 + number / 256) for name, size in tensors.items()}
        save_file(made, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    _drawn()
    with ThreadPoolExecutor(1 + (os.cpu_count() or 1) // 4) as writers:
        list(writers.map(write, range(1, len(groups) + 1), groups.values()))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@lru_cache
def _random(size: tuple[int, ...]) -> torch.Tensor:
    count = torch.Size(size).numel()
    values = _drawn().repeat(-(-count // len(_drawn())))[:count].view(size)
    return 1 + 0.1 * values if len(size) == 1 else values / size[-1] ** 0.5


@lru_cache
def _drawn() -> torch.Tensor:
    """Normal numbers that are repeated, for drawing billions takes minutes. Their odd number makes
    every row of a matrix another one."""
    return torch.randn((1 << 22) + 3).bfloat16()


def quantize(given: argparse.Namespace) -> dict[str, Any]:
    """In this process: seconds, seconds a block, peak RSS and peak GPU memory in GB."""
    from awq import AutoAWQForCausalLM, quantize_directory

    ended, planned = note_ends_of_blocks(given.profile), note_plan()
    if given.limit_gb:
        limit = int(given.limit_gb * GB)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if given.gpu_limit_gb and torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(given.gpu_limit_gb * GB / whole)
    forget_pages(given.model)
    drawn = torch.Generator().manual_seed(0)  # a run goes on with its own texts only
    ids = torch.randint(3, 1000, (given.samples, given.tokens), generator=drawn)
    settings = {"q_group_size": given.group_size}
    options = {"preset": given.preset, "progress": False}
    if given.plain:
        options |= {"scaling": False, "clip": False}
    output = given.output or Path(tempfile.mkdtemp(dir=given.home)) / "out"
    start = time.monotonic()
    if given.child == "memory":
        model = AutoAWQForCausalLM.from_pretrained(str(given.model))
        report = model.quantize(ids, quant_config=settings, **options)
        model.save_quantized(output)
    else:
        report = quantize_directory(given.model, output, settings, ids, **options)
    seconds = time.monotonic() - start
    if given.output is None:
        shutil.rmtree(output.parent)
    blocks = len({re.sub(r"(\.\d+)\..*", r"\1", line.name) for line in report.linears})
    layers = json.loads((given.model / "config.json").read_text())["num_hidden_layers"]
    assert blocks == layers, (blocks, layers)
    gpu = torch.cuda.max_memory_allocated() / GB if torch.cuda.is_available() else 0.0
    return {
        "seconds": round(seconds, 1),
        "blocks": blocks,
        **times_of_blocks(ended),
        "phases": {name: round(value, 1) for name, value in report.phases.items()},
        "peak_rss_gb": peak_rss_gb(),
        "peak_gpu_gb": round(gpu, 2),
        "planned": planned,
    }


def peak_rss_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB, 2)


Times = list[tuple[float, dict[str, float]]]  # when, and the phases' seconds until then


def note_ends_of_blocks(profile_last: bool) -> Times:
    """A list that gets an entry when the walk begins, and one when each block is done. Between two
    of them lie the writing of a block, the wait for the next one, and all work on it."""
    from awq.quantize import pipeline
    from awq.quantize.run import QuantizeRun

    ended: Times = []
    phase, go_on = QuantizeRun.phase, QuantizeRun.go_on

    @contextmanager
    def finished_phase(run: Any, name: str) -> Iterator[None]:
        with phase(run, name):
            yield
            if run.device.type == "cuda":
                torch.cuda.synchronize()

    def begin(run: Any, walk: Any) -> None:
        go_on(run, walk)
        ended.append((time.monotonic(), {}))

    def quantize_block(run: Any, visit: Any, work: Any = pipeline.quantize_block) -> None:
        last = len(ended) == len(run.lists[0][1])
        with profiled() if profile_last and last else nullcontext():
            work(run, visit)
            phases = {name: value for name, value in run.report.phases.items() if name != "inputs"}
            ended.append((time.monotonic(), phases))
        spent = _spent(*ended[-2:])
        print(f"{visit.name} peak {peak_rss_gb()} GB, {spent}", file=sys.stderr, flush=True)

    QuantizeRun.phase, QuantizeRun.go_on = finished_phase, begin
    pipeline.quantize_block = quantize_block
    return ended


def note_plan() -> dict[str, float]:
    """A table that gets what a streamed run plans before its work: GB and seconds."""
    from awq.quantize import forecast

    planned: dict[str, float] = {}

    def check_memory(needed: Any, check: Any = forecast.check_memory) -> Any:
        fitting = check(needed)
        for name in ("ram", "gpu", "disk", "activations"):
            planned[f"{name}_gb"] = round(getattr(fitting, name) / GB, 2)
        planned["seconds"] = round(fitting.seconds, 1)
        print(f"planned {planned}", file=sys.stderr, flush=True)
        return fitting

    forecast.check_memory = check_memory
    return planned


def _spent(before: tuple[float, dict], after: tuple[float, dict]) -> dict[str, float]:
    """Seconds of one block, as a whole and by phase."""
    phases = {name: round(value - before[1].get(name, 0), 2) for name, value in after[1].items()}
    whole = after[0] - before[0]
    return {"all": round(whole, 2), **phases, "other": round(whole - sum(phases.values()), 2)}


def times_of_blocks(ended: Times) -> dict[str, Any]:
    """Each block's seconds; the mean without the first one, as a whole and by phase."""
    blocks = [_spent(*pair) for pair in zip(ended, ended[1:])]
    later = blocks[1:] or blocks
    names = dict.fromkeys(name for block in later for name in block)
    means = {name: statistics.mean(b.get(name, 0.0) for b in later) for name in names}
    return {
        "seconds_of_blocks": [block["all"] for block in blocks],
        "seconds_a_block": round(means.pop("all"), 2),
        "seconds_a_block_by_phase": {name: round(value, 2) for name, value in means.items()},
    }


@contextmanager
def profiled() -> Iterator[None]:
    """Prints where the time goes inside, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        yield
        if on_gpu:
            torch.cuda.synchronize()
    # The profiler's own table takes minutes to make of so many events.
    sums: dict[str, list[float]] = {}
    for event in found.profiler.kineto_results.events():
        entry = sums.setdefault(event.name(), [0, 0])
        entry[0] += event.duration_ns() / 1e6
        entry[1] += 1
    for name, (milliseconds, calls) in sorted(sums.items(), key=lambda item: -item[1][0])[:45]:
        print(f"{milliseconds:10.1f} ms {calls:7} × {name[:110]}", file=sys.stderr)


def forget_pages(folder: Path) -> None:
    """Takes the files out of the system's cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_a_process(kind: str, given: argparse.Namespace) -> dict[str, Any]:
    """What `quantize` finds in a process of its own."""
    command = [sys.executable, __file__, "--child", kind, "--model", str(given.model)]
    for name in ("home", "samples", "tokens", "group_size", "preset", "limit_gb", "gpu_limit_gb"):
        command += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
    for name in ("profile", "plain"):
        command += [f"--{name}"] if getattr(given, name) else []
    command += ["--output", str(given.output)] if given.output else []
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while given.rss_limit_gb and run.poll() is None:
        if peak_of(run.pid) > given.rss_limit_gb:
            run.kill()
        time.sleep(0.1)
    said, _ = run.communicate()
    if run.returncode != 0:
        raise SystemExit(f"{kind} ended with status {run.returncode}")
    return json.loads(said.splitlines()[-1])


def peak_of(process: int) -> float:
    """The kernel's VmHWM in GB; 0 when the process has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / GB for line in lines if line.startswith("VmHWM")), 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--in-memory", action="store_true")
    parser.add_argument("--presets", nargs="+", default=["fast"])
    parser.add_argument("--preset", default="fast", help=argparse.SUPPRESS)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--limit-gb", type=float, default=0.0)
    parser.add_argument("--rss-limit-gb", type=float, default=0.0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--gpu-limit-gb", type=float, default=0.0)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--home", default=tempfile.gettempdir())
    parser.add_argument("--child", choices=("streamed", "memory"))
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.child:
        print(json.dumps(quantize(given)))
        return
    import transformers

    on_gpu = torch.cuda.is_available()
    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    made = None
    if given.shape:
        layers = given.layers or SHAPES[given.shape]["num_hidden_layers"]
        made = Path(tempfile.mkdtemp(dir=given.home))
        given.model = made / given.shape
        write_model(given.shape, layers, given.model)
        size = sum(path.stat().st_size for path in given.model.iterdir())
        whole = SHAPES[given.shape]["num_hidden_layers"]
        result |= {"shape": given.shape, "layers": layers, "layers_of_shape": whole}
        result["source_gb"] = round(size / GB, 2)
    for preset in given.presets:
        given.preset = preset
        found = in_a_process("streamed", given)
        if "layers_of_shape" in result:
            first, later = found["seconds_of_blocks"][0], found["seconds_a_block"]
            found["minutes_for_all_blocks"] = round((first + (whole - 1) * later) / 60, 1)
        result[preset] = found
        print(json.dumps(found), file=sys.stderr, flush=True)
    if given.in_memory:
        result["in_memory"] = in_a_process("memory", given)
        peaks = [result[kind]["peak_rss_gb"] for kind in (given.preset, "in_memory")]
        result["rss_ratio"] = round(peaks[0] / peaks[1], 3)
    if made is not None:
        shutil.rmtree(made)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
