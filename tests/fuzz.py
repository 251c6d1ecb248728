"""Mutants of checkpoints, through every door of the package: each is refused by an error of its
own, or gives right values.

A mutant is one change (`mutants.py`) to one of a few tiny checkpoints, which goes through a few of
the doors that read such a checkpoint; a seed decides all three. Faults are:

- foreign: an exception that is not the package's own (behind transformers' own doors those are
transformers' matter)
- made up: values that differ although no setting changed, since something was made up then
- not finite: NaN in silence
- hang: no answer in `MAX_SECONDS`
- crash: the process died of a signal, as it does of reads outside
- code: a pickle was read, a program started, a socket opened, or a program of the checkpoint ran

`python tests/fuzz.py --mutants 20000 --seed 0` prints every fault with the seed that repeats it:
`--seed N --mutants 1`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Mutants run in forked processes, which cannot use a GPU that their parent has used.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import mutants
import torch

from awq import AutoAWQForCausalLM, AutoAWQForEmbedding, Encoder, quantize_directory
from awq.checkpoint import convert_checkpoint
from awq.checkpoint.packed import read_packed
from awq.checkpoint.source import Source
from awq.cli import make_parser
from awq.errors import AwqError
from awq.models.planning import plan_quantization

# relative error: casting a norm to 16 bits changes that much, a made-up tensor far more
SAME = 1e-2
MAX_SECONDS = 20  # of one door
SILENT_SECONDS = 3 * MAX_SECONDS  # of a process, which is then killed
SECONDS_TO_TELL = 1
DOORS_EACH = 3  # of a mutant
# then a new one is forked: whatever one mutant does to a process ends there
MUTANTS_A_PROCESS = 100
MUTANTS_A_LINE = 500  # totals so far, for runs that are cut
FORBIDDEN = {
    "pickle.find_class",
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
}
IDS = torch.arange(4, 16).view(2, 6)
ROWS = torch.randint(4, 60, (8, 16), generator=torch.Generator().manual_seed(0))
TEXTS = ["the cat", "a dog sleeps under the old tree"]


class Theirs(Exception):
    """An error of transformers' own code, after this package's door."""


class Hang(BaseException):
    """A door that does not come back."""


@dataclass
class Door:
    """One way into the package. call: directory → values or None. own: whether foreign exceptions
    are faults."""

    call: Callable[[Path], torch.Tensor | None]
    own: bool = True
    expected: torch.Tensor | None = None


@dataclass
class Outcomes:
    mutants: int = 0
    counts: collections.Counter = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, other: Outcomes) -> None:
        self.mutants += other.mutants
        self.counts.update(other.counts)
        self.faults += other.faults


def from_quantized(folder: Path) -> torch.Tensor:
    return logits(AutoAWQForCausalLM.from_quantized(str(folder), fuse_layers=False, device="cpu"))


def from_pretrained(folder: Path) -> torch.Tensor:
    return logits(AutoAWQForCausalLM.from_pretrained(str(folder)))


def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    """What a model computes that was let in: its forward is transformers', and odd settings are
    that one's to refuse."""
    try:
        return model(IDS, **inputs).logits
    except Exception as error:
        raise Theirs from error


def encoder(folder: Path) -> torch.Tensor:
    return Encoder.from_pretrained(folder, device="cpu").encode(TEXTS)


def for_embedding(folder: Path) -> torch.Tensor:
    return AutoAWQForEmbedding.from_quantized(str(folder), device="cpu").encode(TEXTS)


def encoder_decoder(folder: Path) -> torch.Tensor:
    model = AutoAWQForCausalLM.from_quantized(str(folder), fuse_layers=False, device="cpu")
    return logits(model, decoder_input_ids=IDS)


def gemm(folder: Path) -> torch.Tensor | None:
    return converted(folder, "gemm")


def gemv(folder: Path) -> torch.Tensor | None:
    return converted(folder, "gemv")


def gemv_fast(folder: Path) -> torch.Tensor | None:
    return converted(folder, "gemv_fast")


def converted(folder: Path, version: str) -> torch.Tensor:
    """All packed weights after a conversion, which is exact."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        target = Path(place) / "converted"
        convert_checkpoint(folder, target, version)
        return packed_values(target)


def packed_values(folder: Path) -> torch.Tensor:
    source = Source.open_directory(folder)
    weights = (
        read_packed(name, tensors, source.settings)
        for name, tensors in sorted(source.packed.items())
    )
    return torch.cat([weight.dequantize().flatten() for weight in weights])


def streamed(folder: Path) -> torch.Tensor:
    """Quantized block by block."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        target = Path(place) / "quantized"
        settings = {"q_group_size": 16, "version": "gemm"}
        options = dict(preset="fast", progress=False, general_texts=False)
        quantize_directory(folder, target, settings, ROWS, **options)
        return packed_values(target)


def planned(folder: Path) -> None:
    plan_quantization(folder, quant_config={"q_group_size": 16}).summary()


def info(folder: Path) -> None:
    command("info", str(folder))


def report(folder: Path) -> None:
    command("report", str(folder))
    command("report", str(folder), "--html", str(folder.parent / "report.html"))


def compare(folder: Path) -> None:
    command("compare", str(folder), str(folder))


def evaluate(folder: Path) -> None:
    text = folder.parent / "text.txt"
    text.write_text(" ".join(TEXTS) * 8)
    command("eval", str(folder), "--text", str(text), "--window", "8", "--device", "cpu")


def generate(folder: Path) -> None:
    command("generate", str(folder), TEXTS[0], "--max-new-tokens", "2", "--device", "cpu")


def command(*words: str) -> None:
    """What `awq` does, without its last line of defence."""
    arguments = make_parser().parse_args([*words, "--json"])
    with contextlib.redirect_stdout(io.StringIO()):
        arguments.run(arguments)


def transformers_model(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)(IDS).logits


def transformers_body(folder: Path) -> torch.Tensor:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, trust_remote_code=False)(IDS).last_hidden_state


def transformers_sentences(folder: Path) -> torch.Tensor:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)
    return model.encode(TEXTS, convert_to_tensor=True)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(door: Door, folder: Path, kind: str, what: str) -> str:
    """ "refused", "right", "as told", "theirs" or the fault, beginning with "FAULT"."""
    try:
        with torch.no_grad(), time_limit(MAX_SECONDS):
            value = door.call(folder)
    except AwqError as error:
        lines = str(error).splitlines()
        return (
            "refused"
            if len(lines) == 1 and str(error).isprintable()
            else f"FAULT {len(lines)} lines: {str(error)[:160]!r}"
        )
    except Hang:
        return "FAULT hang" if door.own else "theirs"
    except Theirs:
        return "theirs"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return (
            f"FAULT foreign {type(error).__name__} at {where}: {str(error)[:160]!r}"
            if door.own
            else "theirs"
        )
    if door.expected is None or value is None:
        return "right"
    if not torch.isfinite(value).all():
        return "FAULT not finite" if door.own or "qweight" in what or "scales" in what else "theirs"
    if (
        value.shape == door.expected.shape
        and (value - door.expected).norm() <= SAME * door.expected.norm()
    ):
        return "right"
    if kind not in mutants.KEEP_VALUES:
        return "as told"
    # outside blocks new heads are legitimate there
    return "FAULT made up" if door.own or "layers.0" in what else "theirs"


def watch() -> list[str]:
    """Notes forbidden deeds of this process from now on."""
    seen: list[str] = []

    def hook(event: str, arguments: tuple) -> None:
        if event in FORBIDDEN:
            seen.append(f"{event} {arguments!r:.80}")

    sys.addaudithook(hook)
    return seen


def try_mutant(
    seed: int,
    originals: dict,
    home: Path,
    seen: list[str],
    begin: Callable[[Door], None] | None = None,
) -> Outcomes:
    """One mutant through some doors of its original. begin: called before each door."""
    found = Outcomes()
    chance = random.Random(seed)
    name = chance.choice(sorted(originals))
    original, doors = originals[name]
    folder = home / "mutant"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    kind, what = mutants.mutate(folder, chance)
    for door in chance.sample(doors, min(DOORS_EACH, len(doors))):
        if begin is not None:
            begin(door)
        result = outcome(door, folder, kind, what)
        if seen or list(home.rglob(mutants.MARKER)):
            result = f"FAULT code {seen}"
            seen.clear()
        found.counts[" ".join(result.split()[:2]).rstrip(":")] += 1
        if result.startswith("FAULT"):
            found.faults.append(f"seed {seed}: {name}, {door.call.__name__}, {what!r}: {result}")
    return found


def run_in_a_process(seeds: list[int], originals: dict, home: Path) -> Outcomes:
    """The mutants of these seeds in a forked process; one that dies, or hangs in machine code where
    no alarm reaches it, is a fault of the mutant it was at."""
    record = home / "record.jsonl"
    record.write_text("")
    child = os.fork()
    if child == 0:
        try:
            _record_mutants(seeds, originals, home, record)
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # nothing of the parent's is unwound here
        os._exit(0)
    hung, status = _wait(child, record)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    found = Outcomes()
    for line in lines:
        if "seed" in line:
            found.add(Outcomes(0, collections.Counter(line["counts"]), line["faults"]))
    if status and lines:
        last = lines[-1]
        at = last.get("begun", last.get("seed"))
        if hung and not last.get("own", True):
            found.counts["theirs"] += 1
        else:
            kind = "hang" if hung else "crash"
            found.counts[f"FAULT {kind}"] += 1
            found.faults.append(f"seed {at}: FAULT {kind}, {last.get('door')}, status {status}")
        left = seeds[seeds.index(at) + 1 :]
        if left:
            found.add(run_in_a_process(left, originals, home))
    return found


def _record_mutants(seeds: list[int], originals: dict, home: Path, record: Path) -> None:
    seen = watch()
    faulthandler.register(signal.SIGUSR1)  # tells where a process hangs, also in machine code
    with record.open("a") as file:

        def write(**line: Any) -> None:
            print(json.dumps(line), file=file, flush=True)

        for seed in seeds:
            write(begun=seed)

            def begin(door: Door, seed: int = seed) -> None:
                write(begun=seed, door=door.call.__name__, own=door.own)

            result = try_mutant(seed, originals, home, seen, begin)
            write(seed=seed, counts=dict(result.counts), faults=result.faults)


def _wait(child: int, record: Path) -> tuple[bool, int]:
    """(whether the child was killed because it wrote nothing for too long, its exit code)."""
    size, since = 0, time.monotonic()
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return False, os.waitstatus_to_exitcode(status)
        if record.stat().st_size != size:
            size, since = record.stat().st_size, time.monotonic()
        if time.monotonic() - since > SILENT_SECONDS:
            os.kill(child, signal.SIGUSR1)
            time.sleep(SECONDS_TO_TELL)
            os.kill(child, signal.SIGKILL)
            return True, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.02)


def run(originals: dict, seeds: Iterable[int], seconds: float | None = None) -> Outcomes:
    """originals: name → (directory, doors). seconds: no new process is started after that. Prints
    each fault when it is found."""
    found, seeds, start = Outcomes(), list(seeds), time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        for first in range(0, len(seeds), MUTANTS_A_PROCESS):
            if seconds is not None and time.monotonic() - start > seconds:
                break
            part = run_in_a_process(
                seeds[first : first + MUTANTS_A_PROCESS], originals, Path(place)
            )
            print(*part.faults, sep="\n", end="\n" if part.faults else "", flush=True)
            found.add(part)
            found.mutants += len(seeds[first : first + MUTANTS_A_PROCESS])
            if found.mutants % MUTANTS_A_LINE == 0:
                print_totals(found, seeds[0], time.monotonic() - start)
    return found


def print_totals(found: Outcomes, first_seed: int, seconds: float) -> None:
    print(f"seeds {first_seed} to {first_seed + found.mutants - 1}, {seconds:.0f} s")
    print(json.dumps(dict(sorted(found.counts.items()))), flush=True)


LANGUAGE_MODEL = [from_quantized, gemm, gemv, info, compare, transformers_model]
SENTENCES = [encoder, for_embedding, gemm, info, transformers_body, transformers_sentences]


def make_originals(home: Path) -> dict:
    """Tiny checkpoints of every kind, and the doors that read them with the values that each
    gives."""
    from conftest import make_tokenizer
    from mixtures import mixture
    from test_kinds import encoder_decoder as two_towers
    from test_kinds import vision_language
    from test_loading import packed_model, save

    from awq.checkpoint import save_checkpoint
    from awq.config import AwqConfig

    llama = packed_model("llama", group_size=16)
    made = {"llama": (save(llama, home / "llama", group_size=16), LANGUAGE_MODEL)}
    fast = packed_model("llama", "gemv_fast", hidden_size=64, intermediate_size=128)
    save_checkpoint(
        fast, home / "shards", AwqConfig(group_size=32, format="gemv_fast"), shard_size="40KB"
    )
    made["shards"] = (home / "shards", [*LANGUAGE_MODEL, gemv_fast])
    made["gelu"] = (
        save(_with_activation_scales(), home / "gelu", group_size=16),
        [*LANGUAGE_MODEL, evaluate],
    )
    made["bert"] = (
        _sentence_encoder(save(packed_model("bert", group_size=16), home / "bert", group_size=16)),
        SENTENCES,
    )
    by_parts = find_spec("transformers.core_model_loading") is not None  # from transformers 5 on
    made["dense"] = (_dense_model(home / "dense"), [from_pretrained] + [planned] * by_parts)
    if by_parts:
        made["streamed"] = (_dense_model(home / "streamed", torch.bfloat16), [streamed])
    kinds = {
        "mixture": (mixture("mixtral"), [from_quantized, gemv, info, report, compare, generate]),
        "vision": (vision_language("llava"), [from_quantized, gemv, report]),
        "decoder": (two_towers("t5"), [encoder_decoder, gemm, report, compare]),
    }
    for name, (model, calls) in kinds.items():
        made[name] = (_quantized(model, home / name), calls)
    for folder, _ in made.values():
        make_tokenizer().save_pretrained(folder)
    with torch.no_grad():
        return {
            name: (folder, [_door(call, folder) for call in calls])
            for name, (folder, calls) in made.items()
        }


def _door(call: Callable, folder: Path) -> Door:
    return Door(call, not call.__name__.startswith("transformers"), call(folder))


def _with_activation_scales() -> torch.nn.Module:
    from test_loading import packed_model

    from awq.nn.activation import ScaledActivation

    model = packed_model("starcoder2", group_size=16)
    for block in model.model.layers:
        block.mlp.act = ScaledActivation(
            block.mlp.act, torch.rand(block.mlp.c_proj.in_features) + 0.5
        )
    return model


def _dense_model(folder: Path, numbers_of: torch.dtype = torch.float32) -> Path:
    """numbers_of: a dtype that can hold the float32 weights. A mutant that casts one of them to it
    keeps the value: else the search for scales may honestly end elsewhere."""
    import zoo

    return _saved(zoo.tiny_model("llama").to(numbers_of).float(), folder)


def _saved(model: Any, folder: Path) -> Path:
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    return folder


def _quantized(model: Any, folder: Path) -> Path:
    """A checkpoint with its report."""
    source = _saved(model, folder.with_name(f"{folder.name}-source"))
    wrapper = AutoAWQForCausalLM.from_pretrained(str(source))
    wrapper.quantize(ROWS, quant_config={"q_group_size": 16}, preset="fast", progress=False)
    wrapper.save_quantized(folder)
    _round_to_bfloat16(folder)
    return folder


def _round_to_bfloat16(folder: Path) -> None:
    """What is dense gets values that bfloat16 holds, as in `_dense_model`: T5's attention, which
    scales nothing, makes an error of 3 % of the 0.2 % that a cast of its embeddings costs."""
    from safetensors.torch import load_file, save_file

    for path in folder.glob("*.safetensors"):
        tensors = {
            name: tensor.bfloat16().to(tensor.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in load_file(path).items()
        }
        save_file(tensors, path, {"format": "pt"})


def _sentence_encoder(folder: Path) -> Path:
    """Pooling, a dense head and normalisation for a packed encoder."""
    from safetensors.torch import save_file

    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    paths = ["", "1_Pooling", "2_Dense", "3_Normalize"]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths))
    ]
    settings = {
        "modules.json": listed,
        "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"query": "the "},
            "default_prompt_name": None,
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": 32,
            "pooling_mode_mean_tokens": True,
            "include_prompt": True,
        },
        "2_Dense/config.json": {
            "in_features": 32,
            "out_features": 16,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        },
    }
    for name, content in settings.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    generator = torch.Generator().manual_seed(0)
    head = {
        "linear.weight": torch.randn(16, 32, generator=generator),
        "linear.bias": torch.randn(16, generator=generator),
    }
    save_file(head, folder / "2_Dense" / "model.safetensors")
    (folder / "3_Normalize").mkdir()
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mutants", type=int, default=2000)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first mutant; the others follow"
    )
    parser.add_argument("--seconds", type=float, default=None, help="stop after so many")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        originals = make_originals(Path(home))
        found = run(
            originals, range(arguments.seed, arguments.seed + arguments.mutants), arguments.seconds
        )
    print_totals(found, arguments.seed, time.monotonic() - start)
    return int(bool(found.faults))


if __name__ == "__main__":
    tests = Path(__file__).parent
    sys.path[:0] = [str(tests), str(tests.parent / "examples")]
    sys.exit(main())
