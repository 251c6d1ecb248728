"""Threads that use one model at once, and what each of them must get: the answers of a model that
nobody else uses.

Every round starts with a fresh copy of a quantized model, which nobody has called yet. Sixteen
threads do what servers, trainers and savers do, in an order that the seed decides, while Python
switches threads every microsecond. Afterwards the model must still answer as before. `python
tests/thread_cases.py ROUNDS SEED [DEVICE [SECONDS]]` runs longer and prints what it tried.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import torch
import transformers
import zoo
from conftest import make_tokenizer
from safetensors.torch import load_file
from transformers.generation.streamers import BaseStreamer

from awq.core.weight import round_to_nearest
from awq.embed.encoder import Encoder
from awq.models.base import BaseAWQForCausalLM
from awq.nn.layout import prepare, restore
from awq.nn.linear import WQLinear
from awq.nn.surgery import get_weight, named_linears, replace_module

SETTINGS = {"q_group_size": 32, "w_bit": 4, "version": "GEMM", "zero_point": True}
THREADS = 16
SWITCH = 1e-6  # seconds
TEXTS = [
    "the cat runs",
    "a dog",
    "the old tree",
    "red and blue stone under water",
    "fire",
    "quick slow",
    "new house",
    "river",
]
FAMILIES = {
    "qwen2": dict(num_key_value_heads=2, hidden_size=64, intermediate_size=96),
    "bloom": dict(hidden_size=64, n_head=4, n_layer=3),
}


class Case:
    """A model that is never called itself, copies of it to try on, and the answers that are
    right."""

    def __init__(self, family: str, device: str = "cpu") -> None:
        self.family, self.device = family, device
        self.rows = [
            torch.randint(3, 63, (24,), generator=torch.Generator().manual_seed(i))
            for i in range(8)
        ]
        self.dense = zoo.build(family, FAMILIES[family])
        self.model = self._quantized()
        self.encoder = _encoder(device)
        self.embeddings = copy.deepcopy(self.encoder).encode(TEXTS)
        alone = self.fresh()
        self.prompts = [self._prompt(i) for i in range(6)]
        self.tokens = [self._generate(alone, i) for i in range(6)]
        self.beams = [self._generate(alone, i, num_beams=2) for i in range(6)]
        with torch.no_grad():
            self.logits = [alone(**prompt).logits for prompt in self.prompts]
        self.losses = [self._loss(alone, i) for i in range(6)]
        self.state = {name: tensor.cpu() for name, tensor in alone.model.state_dict().items()}

    def _quantized(self) -> BaseAWQForCausalLM:
        # A copy: building one draws from torch's only generator, from which threads would take each
        # other's numbers.
        model = BaseAWQForCausalLM(copy.deepcopy(self.dense), f"./tiny-{self.family}")
        model.quantize(self.rows, quant_config=SETTINGS, preset="fast", progress=False)
        return model

    def fresh(self) -> BaseAWQForCausalLM:
        """A copy whose first call is still to come, as is the first one of the encoder that is
        served beside it."""
        self.fresh_encoder = copy.deepcopy(self.encoder)
        model = copy.deepcopy(self.model).to(self.device)
        model.fuse_layers(64)
        return model

    def _prompt(self, i: int) -> dict[str, torch.Tensor]:
        batch = zoo.token_batch(1 + i % 3, 3 + 2 * i, seed=i)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _generate(self, model: Any, i: int, **settings: Any) -> torch.Tensor:
        return model.generate(
            **self.prompts[i], max_new_tokens=8, do_sample=False, pad_token_id=0, **settings
        )

    def _loss(self, model: Any, i: int) -> torch.Tensor:
        embeddings = (
            model.model.get_input_embeddings()(self.prompts[i]["input_ids"])
            .detach()
            .requires_grad_()
        )
        model(inputs_embeds=embeddings, labels=self.prompts[i]["input_ids"]).loss.backward()
        return embeddings.grad

    # What a thread may do: each returns whether its answer was right.

    def generates(self, model: Any, i: int) -> bool:
        return torch.equal(self._generate(model, i), self.tokens[i])

    def searches_beams(self, model: Any, i: int) -> bool:
        return torch.equal(self._generate(model, i, num_beams=2), self.beams[i])

    def runs_forward(self, model: Any, i: int) -> bool:
        with torch.no_grad():
            return _close(model(**self.prompts[i]).logits, self.logits[i])

    def trains(self, model: Any, i: int) -> bool:
        return _close(self._loss(model, i), self.losses[i])

    def trains_on_what_it_generated(self, model: Any, i: int) -> bool:
        tokens = self._generate(model, i)
        model(input_ids=tokens, labels=tokens).loss.backward()
        return torch.equal(tokens, self.tokens[i])

    def saves(self, model: Any, _i: int) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            model.save_quantized(Path(folder) / "saved")
            found = load_file(Path(folder) / "saved" / "model.safetensors")
        return bool(found) and all(
            torch.equal(tensor, self.state[name]) for name, tensor in found.items()
        )

    def reads_the_state(self, model: Any, _i: int) -> bool:
        found = model.model.state_dict()
        return found.keys() == self.state.keys() and all(
            torch.equal(t.cpu(), self.state[n]) for n, t in found.items()
        )

    def copies(self, model: Any, i: int) -> bool:
        return self.generates(copy.deepcopy(model), i)

    def pickles(self, model: Any, i: int) -> bool:
        return self.generates(pickle.loads(pickle.dumps(model)), i)

    def unfuses(self, model: Any, _i: int) -> bool:
        model.unfuse()
        return True

    def fuses(self, model: Any, _i: int) -> bool:
        return (model.fuse() is not None) == (self.family == "qwen2")

    def encodes(self, _model: Any, i: int) -> bool:
        """Texts through an encoder that all threads share, beside the language model."""
        return _close(self.fresh_encoder.encode(TEXTS[i:]), self.embeddings[i:])

    def quantizes_another(self, _model: Any, _i: int) -> bool:
        """Beside serving, a model of the same weights is quantized; the bits must be those of a
        quiet process."""
        found = copy.deepcopy(self._quantized()).model.state_dict()
        return all(torch.equal(tensor.cpu(), self.state[name]) for name, tensor in found.items())

    def changes_layouts(self, model: Any, _i: int) -> bool:
        restore(model.model)
        return prepare(model.model) > 0


DEEDS: dict[str, int] = {
    "generates": 8,
    "searches_beams": 1,
    "runs_forward": 5,
    "trains": 2,
    "trains_on_what_it_generated": 1,
    "saves": 1,
    "reads_the_state": 1,
    "copies": 1,
    "pickles": 1,
    "unfuses": 1,
    "fuses": 1,
    "changes_layouts": 2,
    "encodes": 3,
    "quantizes_another": 1,
}


def _encoder(device: str) -> Encoder:
    model = zoo.tiny_model("bert")
    for name, linear in named_linears(model).items():
        packed = WQLinear.from_quantized(round_to_nearest(get_weight(linear), 16), linear.bias)
        if "pooler" not in name:
            replace_module(model, name, packed)
    return Encoder(model, make_tokenizer()).to(device).eval()


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).norm()) <= 1e-4 * float(expected.norm())


class Streamer(BaseStreamer):
    """Does nothing with the tokens."""

    def put(self, value: torch.Tensor) -> None:
        pass

    def end(self) -> None:
        pass


@contextmanager
def quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def first_callers(case: Case, dice: random.Random) -> list[str]:
    """Sixteen threads whose first call is `generate`, all at once."""
    return _together(
        case, case.fresh(), [[("generates", dice.randrange(6))] for _ in range(THREADS)]
    )


def everything_at_once(case: Case, dice: random.Random, deeds_each: int = 3) -> list[str]:
    """Sixteen threads that do different things to one model."""
    names = dice.choices(list(DEEDS), list(DEEDS.values()), k=THREADS * deeds_each)
    deeds = [(name, dice.randrange(6)) for name in names]
    return _together(case, case.fresh(), [deeds[i::THREADS] for i in range(THREADS)])


def _together(case: Case, model: Any, deeds: list[list[tuple[str, int]]]) -> list[str]:
    """What went wrong, one line each; `deeds` of each thread."""
    wrong: list[str] = []
    start = Barrier(len(deeds))

    def work(mine: list[tuple[str, int]]) -> None:
        start.wait()
        for name, i in mine:
            _try(getattr(case, name), model, i, wrong)

    threads = [Thread(target=work, args=(mine,)) for mine in deeds]
    with quick_switches():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(6):
        _try(case.generates, model, i, wrong, "afterwards: ")
    _try(case.runs_forward, model, 0, wrong, "afterwards: ")
    return wrong


def _try(
    deed: Callable[[Any, int], bool], model: Any, i: int, wrong: list[str], when: str = ""
) -> None:
    try:
        right = deed(model, i)
    except Exception as error:
        wrong.append(f"{when}{deed.__name__}({i}): {type(error).__name__}: {str(error)[:200]}")
        return
    if not right:
        wrong.append(f"{when}{deed.__name__}({i}) gave another answer")


def main(rounds: int, seed: int, device: str = "cpu", limit: float = math.inf) -> int:
    """Prints what was tried as JSON; returns how many answers were wrong. limit: seconds after
    which no round begins."""
    torch.set_num_threads(1)
    dice, tried, wrong, start = random.Random(seed), Counter(), [], time.perf_counter()
    cases = [Case(family, device) for family in FAMILIES]
    for i in range(rounds):
        if time.perf_counter() - start > limit:
            break
        case = cases[i % len(cases)]
        found = first_callers(case, dice) if i % 4 < 2 else everything_at_once(case, dice)
        tried["first callers" if i % 4 < 2 else "everything at once"] += 1
        wrong += [f"round {i}, {case.family}: {line}" for line in found]
        if i % 10 == 9:
            done = f"{i + 1} rounds, {len(wrong)} wrong"
            print(done, f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    seconds = round(time.perf_counter() - start, 1)
    about = {
        "seed": seed,
        "rounds": sum(tried.values()),
        "transformers": transformers.__version__,
        "threads": THREADS,
        "device": device,
        "seconds": seconds,
        "tried": dict(tried),
    }
    print(json.dumps(about | {"wrong": len(wrong), "examples": wrong[:10]}, indent=1))
    return len(wrong)


if __name__ == "__main__":
    rounds, seed, device, limit = [*sys.argv[1:], *("8", "0", "cpu", "inf")[len(sys.argv) - 1 :]]
    sys.exit(bool(main(int(rounds), int(seed), device, float(limit))))
