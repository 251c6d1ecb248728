"""How every tiny decoder generates on a GPU: fused, partly fused, captured or as transformers does.

    python benchmarks/zoo_gpu.py --json benchmarks/results/zoo-gpu.json --seconds 50

Quantized random models in float16 (`tiny_kinds`; dense where they cannot be quantized, in float32
where transformers' own loop fails in 16 bits): three prompts padded on the left, eight greedy
tokens, beside transformers' own loop on the same GPU. `graph` says whether the step ran as a CUDA
graph; `same`, whether the tokens are equal or part at a tie; where they part, `parts` says after
how many tokens of each row and by how much, and `float32` whether they do so there. Each kind is a
process of its own, for a fault on a GPU ends a process. First come those that no earlier result
shows as proven there. The file is written whenever a kind ends; what is not done after `--seconds`
is listed as left over, and `--keep` takes it from an earlier result, with the commit of that.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import common
import torch
import transformers
from tiny_kinds import Kind, all_kinds, build, inputs
from torch import nn
from zoo_checks import NEW_TOKENS, _gap, _settings

from awq.models.base import BaseAWQForCausalLM

START = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
KNOWN = ROOT / "benchmarks" / "results" / "zoo.json"
EARLIER = KNOWN.with_name("zoo-gpu-h200.json")
TIE = 0.05  # in standard deviations of the logits, in 16 bits
KIND_SECONDS = 150  # of which most go into compiling, beside as many others


class Reasons(logging.Handler):
    """Keeps what the package says about graphs that it does not make."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage()[:300])


def look_at(kind: Kind, device: str) -> dict[str, Any]:
    """What one kind does."""
    reasons = Reasons()
    log = logging.getLogger("awq")
    log.setLevel(logging.WARNING)
    log.propagate = False
    log.addHandler(reasons)
    model: Any = build(kind).eval()
    wrapper = BaseAWQForCausalLM(model, kind.type)
    found: dict[str, Any] = {"quantized": True}
    try:
        few = inputs(kind, model, rows=4, length=32, seed=3, padding="right")
        wrapper.quantize(few, quant_config=_settings(), preset="fast", progress=False)
    except Exception as error:  # of anybody's model: it generates as it is
        found["quantized"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    model.to(device, torch.float16)
    item = inputs(kind, model, rows=3, length=12, seed=21, padding="left")
    item = {name: tensor.to(device) for name, tensor in item.items()}
    item.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    beside_it = beside(wrapper, item, settings)
    if "transformers" in beside_it:  # its own loop fails in 16 bits
        found["dtype"] = "float32"
        to_float32(wrapper)
        beside_it = beside(wrapper, item, settings)

    found |= beside_it
    if found.get("same") is False:  # a wrong answer, or another one by rounding
        found["float32"] = in_float32(wrapper, item, settings)
    found["warnings"] = reasons.lines
    return found


def beside(wrapper: Any, item: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """How a model generates, and whether as transformers' own loop does."""
    model = wrapper.model
    wrapper.fuse_layers(max_seq_len=64)
    wrapper.fuse()
    found: dict[str, Any] = {"fusion": str(wrapper.fusion)}
    try:
        theirs = model.generate(
            **item, **settings, return_dict_in_generate=True, output_scores=True
        )
    except Exception as error:
        return found | {"transformers": f"{type(error).__name__}: {str(error)[:160]}"}
    ours = wrapper.generate(**item, **settings)
    decoder: Any = wrapper._decoder or wrapper._captured
    graphs = [getattr(decoder, name, None) for name in ("graphs", "greedy_graphs")]
    found["graph"] = any(graphs)
    found["same"] = same(ours, theirs) or same_alone(model, item, ours, settings)
    if not found["same"]:
        found["parts"] = partings(ours, theirs)
    return found


def to_float32(wrapper: Any) -> None:
    """The same values in float32: transformers refuses to cast quantized models, which packed ones
    allow."""
    wrapper.unfuse()
    nn.Module.float(wrapper.model)


def in_float32(wrapper: Any, item: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """`beside` with the same values in float32, and whether transformers' own loop gives in 16 bits
    what it gives there: where it does not, rounding alone changes its tokens."""
    model = wrapper.model
    rounded = model.generate(**item, **settings)
    to_float32(wrapper)
    found = beside(wrapper, item, settings)
    exact = model.generate(**item, **settings, return_dict_in_generate=True, output_scores=True)
    return found | {"transformers_in_16_bits": partings(rounded, exact)}


def same(ours: torch.Tensor, theirs: Any) -> bool:
    """Whether all rows are equal, or part where the two tokens are as good as equal."""
    if ours.shape != theirs.sequences.shape:
        return False
    return all(gap <= TIE for _, gap in partings(ours, theirs))


def partings(ours: torch.Tensor, theirs: Any) -> list[tuple[int, float]]:
    """For each row that is not equal: the new tokens that are, and how far the logit of our next
    token is below that of theirs, in standard deviations."""
    start = ours.shape[1] - len(theirs.scores)
    found = []
    for row, (a, b) in enumerate(zip(ours, theirs.sequences)):
        places = (a != b).nonzero().flatten()
        if len(places):
            place = int(places[0])
            gap = _gap(theirs.scores[place - start][row].float(), a[place], b[place])
            found.append((place - start, round(gap, 4)))
    return found


def same_alone(model: Any, item: dict, ours: torch.Tensor, settings: dict[str, Any]) -> bool:
    """Whether each row is what transformers' loop gives for it without padding: in 16 bits padding
    moves the logits of its own loop, and a router may choose other experts."""
    for row, mask in enumerate(item["attention_mask"].bool()):
        ids = item["input_ids"][row, mask].unsqueeze(0)
        found = model.generate(
            input_ids=ids, **settings, return_dict_in_generate=True, output_scores=True
        )
        width = ids.shape[1] + NEW_TOKENS
        if not same(ours[row : row + 1, -width:], found):
            return False
    return True


def sweep(
    kinds: list[Kind],
    device: str,
    workers: int,
    seconds: float,
    note: Callable[[dict[str, Any]], None],
) -> None:
    """Looks at the kinds that are done in time. note: told of all that was found, kind → what it
    does, whenever there is more."""
    folder = Path(tempfile.mkdtemp())
    waiting, running = list(kinds), {}
    while (waiting or running) and time.monotonic() - START < seconds:
        while waiting and len(running) < workers:
            kind = waiting.pop(0)
            running[_begin(kind, device, folder)] = kind, time.monotonic()
        for pid, (_, begun) in list(running.items()):
            done, _ = os.waitpid(pid, os.WNOHANG)
            if not done and time.monotonic() - begun > KIND_SECONDS:
                os.kill(pid, 9)
                done, _ = os.waitpid(pid, 0)
            if done:
                del running[pid]
                note(_read(folder))
        time.sleep(0.02)
    for pid in running:
        os.kill(pid, 9)


def _read(folder: Path) -> dict[str, Any]:
    """Kind → what it does, of those that are done."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return {row.pop("kind"): row for row in rows}


def _begin(kind: Kind, device: str, folder: Path) -> int:
    assert not torch.cuda.is_initialized(), "a forked process could not use the GPU"
    pid = os.fork()
    if pid:
        return pid
    begun = time.monotonic()
    try:
        row = look_at(kind, device)
    except BaseException as error:  # of anybody's model: the others go on
        row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    row |= {"kind": str(kind), "seconds": round(time.monotonic() - begun, 1)}
    new = folder / f"{kind.type}.{kind.role}.new"
    new.write_text(json.dumps(row), encoding="utf-8")
    new.rename(new.with_suffix(".json"))
    os._exit(0)


def in_order(kinds: list[Kind]) -> list[Kind]:
    """Those first of which least is known: what an earlier run did not show as proven, what was not
    fused when the zoo was swept."""
    earlier = _kinds_of(EARLIER)
    fused = {name for name, row in _kinds_of(KNOWN).items() if row.get("fusion") == "fused"}
    return sorted(kinds, key=lambda kind: (_proven(earlier.get(str(kind), {})), str(kind) in fused))


def _kinds_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))["kinds"] if path.is_file() else {}


def _proven(row: dict[str, Any]) -> bool:
    return bool(row.get("same") and row.get("graph"))


def counts(found: dict[str, Any]) -> dict[str, int]:
    """State → kinds, with the same tokens where both generate, and a graph."""
    result: dict[str, int] = {}
    for row in found.values():
        state = row.get("fusion", "error").partition(":")[0]
        name = f"{state}, same tokens, graph" if _proven(row) else state
        result[name] = result.get(name, 0) + 1
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300.0, help="after the imports")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--roles", default="causal", help="comma-separated roles")
    parser.add_argument("--types", default="", help="comma-separated types")
    parser.add_argument("--keep", action="store_true", help="what was known of the others, too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    kinds = [kind for kind in all_kinds() if kind.role in given.roles.split(",")]
    kept: dict[str, Any] = {}
    if given.keep:
        known = _kinds_of(EARLIER)
        kept = {name: known[name] for name in map(str, kinds) if name in known}
    if given.types:
        kinds = [kind for kind in kinds if kind.type in given.types.split(",")]
    names = {str(kind) for kind in kinds}
    # of a CPU until all are done: to ask the GPU for its name would keep forked processes from it
    where = common.head("cpu")

    def keep(found: dict[str, Any]) -> None:
        found = kept | {name: row | {"commit": where["commit"]} for name, row in found.items()}
        left = sorted(names - set(found))
        result = {"counts": counts(found), "left_over": left, "kinds": found}
        given.json.write_text(json.dumps(where | result, indent=1) + "\n", encoding="utf-8")

    keep({})
    sweep(in_order(kinds), given.device, given.workers, given.seconds, keep)
    result = json.loads(given.json.read_text(encoding="utf-8")) | common.head(given.device)
    given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["counts"], indent=1), f"{len(result['left_over'])} left over")


if __name__ == "__main__":
    main()
