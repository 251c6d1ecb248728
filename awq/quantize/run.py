"""`QuantizeRun`: what the steps of one quantization share, and the checks that come before any
weight is touched."""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from awq.calibration import CalibrationBatch
from awq.calibration.batches import BATCH_TOKENS, rebatched
from awq.config import AwqConfig
from awq.core.weight import QuantizedWeight
from awq.errors import CalibrationError
from awq.folds import InputGroup
from awq.kernels import tf32
from awq.nn.blocks import BlockList, find_block_lists
from awq.nn.decoder_inputs import with_decoder_inputs
from awq.nn.hidden import HiddenStates
from awq.nn.linear import WQLinear
from awq.nn.memory import peak_resident_memory
from awq.nn.presence import BlockStore
from awq.nn.surgery import device_of, get_weight, linear_shape, replace_module
from awq.nn.walk import BlockWalk
from awq.nn.weight_access import watched_weights
from awq.quantize.experts import skip_in_mixtures
from awq.quantize.match import Embed, OutputMatch, held_out, in_large_batches, micro_batches
from awq.quantize.options import QuantizeOptions
from awq.quantize.plan import Plan, make_plan
from awq.quantize.report import QuantReport
from awq.quantize.resume import progress_of, restore_progress, settings_of
from awq.quantize.statistics import TOKENS_PER_CHANNEL
from awq.quantize.towers import chosen_lists

logger = logging.getLogger("awq.quantize")

# Values of the widest input in one forward on a GPU, 128 MiB. With fewer, narrow blocks wait for
# the host.
GPU_BATCH_VALUES = 2**25


@dataclass
class QuantizeRun:
    """batches: as they are worked on. device: where blocks are. judges: batches held out for the
    tuning, if there is any. tuning_batches: the same rows, as steps of training.

    shared: full names of modules whose weights have another name. twins: linear → others that share
    its weight and become
    the same packed linear. known_folds: structure of a block → its folds.
    weights: full name → weight, kept for the tuning. leans: the same, where their codes begin
    (`awq.quantize.tuned`).
    original_hidden: the hidden states of the original model before the present block, where they
    are needed.
    store: keeps the blocks' weights; None: the model has them.
    began: when this run did, by `time.perf_counter`. taken_before: what earlier runs that it goes
    on from had taken (`taken`).
    """

    model: nn.Module
    lists: list[BlockList]
    batches: list[CalibrationBatch]
    config: AwqConfig
    options: QuantizeOptions
    plan: Plan
    report: QuantReport
    device: torch.device
    judges: frozenset[int] = frozenset()
    tuning_batches: list[CalibrationBatch] = field(default_factory=list)
    shared: frozenset[str] = frozenset()
    twins: dict[str, list[str]] = field(default_factory=dict)
    known_folds: dict[Any, list[InputGroup]] = field(default_factory=dict)
    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    leans: dict[str, Tensor] = field(default_factory=dict)
    original_hidden: HiddenStates | None = None
    store: BlockStore | None = None
    began: float = field(default_factory=time.perf_counter)
    taken_before: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        model: nn.Module,
        batches: Sequence[CalibrationBatch],
        config: AwqConfig,
        options: QuantizeOptions,
        store: BlockStore | None = None,
    ) -> QuantizeRun:
        """Raises ConfigError, CalibrationError or ModelError for what cannot be quantized."""
        if not batches or not any(int(b.attention_mask.sum()) for b in batches):
            raise CalibrationError("the calibration data holds no token; give at least one text.")

        lists = find_block_lists(model)
        item = _model_inputs(model, batches[0])
        reached, towers = chosen_lists(model, lists, item, options.towers)
        unreached = [prefix for prefix, _ in lists if prefix not in {**dict(reached), **towers}]
        plan = make_plan(
            model, reached, config, not options.export_compatible, unreached, list(towers)
        )
        skip_in_mixtures(plan, model)
        twins = _take_twins(plan, model)
        if store is not None:
            store.begin(reached, plan.targets, config)

        widest = max(linear_shape(model.get_submodule(name))[0] for name in plan.targets)
        device = work_device(device_of(model), options)
        tokens = _batch_tokens(device, widest)
        batches = rebatched(batches, tokens)
        tuning_batches: list[CalibrationBatch] = []
        judges = frozenset[int]()

        if options.tuning:
            tuning_batches = micro_batches(batches, device)
            batches, judges = in_large_batches(tuning_batches, tokens)

        batches = [_complete(model, batch) for batch in batches]
        tuning_batches = [_complete(model, batch) for batch in tuning_batches]
        report = QuantReport(
            config.to_dict(), asdict(options), skipped=plan.skipped, versions=_versions()
        )
        report.tokens = sum(int(b.attention_mask.sum()) for b in batches)
        _warn_of_few_tokens(report, widest)
        report.warnings += plan.warnings
        shared = _shared_modules(model)
        run = cls(
            model,
            reached,
            batches,
            config,
            options,
            plan,
            report,
            device,
            judges,
            tuning_batches,
            shared,
            twins,
            store=store,
        )

        if store is not None:
            store.phase = run.phase
            store.ahead = device.type != "cpu"

        return run

    @property
    def corrects_inputs(self) -> bool:
        """Whether codes make up for the error of a linear's input, so that the original model's
        inputs are needed."""
        return bool(self.options.correction) and self.options.rounding == "feedback"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to the report."""
        start = time.perf_counter()
        yield
        self.report.phases[name] = self.report.phases.get(name, 0.0) + time.perf_counter() - start

    def taken(self) -> dict[str, float]:
        """What this run and those that it goes on from have taken so far: seconds of all, and the
        highest peak of memory (resident bytes) and gpu_memory (allocated bytes)."""
        before = self.taken_before
        seconds = time.perf_counter() - self.began
        on_gpu = self.device.type == "cuda"
        gpu_memory = torch.cuda.max_memory_allocated(self.device) if on_gpu else 0

        return {
            "memory": max(peak_resident_memory(), before.get("memory", 0)),
            "gpu_memory": max(gpu_memory, before.get("gpu_memory", 0)),
            "seconds": seconds + before.get("seconds", 0.0),
        }

    def output_match(self, embed: Embed | None = None) -> OutputMatch | None:
        """The original model's output, to tune for; None without tuning."""
        if not self.options.tuning:
            return None

        judging = held_out(len(self.tuning_batches))
        options = self.options

        return OutputMatch(
            self.model,
            self.tuning_batches,
            judging,
            embed,
            options.tuning or 0,
            options.seed,
            options.progress,
        )

    def walk(self) -> BlockWalk:
        """Over all blocks, with calibration inputs. Linears whose weight the model reads itself
        leave the plan."""
        inputs = [batch.model_inputs() for batch in self.batches]
        with watched_weights(self.model, self.plan.targets) as read:
            walk = BlockWalk(self.model, self.lists, inputs, True, self.device, self.store)
        self.plan.skip(read, "its weight is read past its forward")
        return walk

    def kept_hidden(self, tensors: Iterable[Tensor]) -> HiddenStates:
        """Hidden states of the original model, kept where those of the calibration are."""
        room = None if self.store is None else self.store.room
        return HiddenStates(tensors, device_of(self.model), room)

    def go_on(self, walk: BlockWalk) -> None:
        """Takes up where an earlier run ended, if blocks are kept for that."""
        if self.store is None:
            return

        progress = self.store.go_on(settings_of(self), lambda: progress_of(self, walk))
        if progress is not None:
            walk.go_on(progress)
            restore_progress(self, progress)
            logger.info("going on behind %d finished blocks", progress.finished)

    def install(
        self,
        root: nn.Module,
        name: str,
        full_name: str,
        weight: QuantizedWeight,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Puts a quantized weight into the model: packed, or as the values of the ordinary linear
        `root.<name>`.

        full_name: of the linear in the model. dtype: of the model, where the linear's is another
        one for now.
        """
        linear: Any = root.get_submodule(name)
        if self.options.export_compatible:
            get_weight(linear).copy_(weight.dequantize())
            return

        bias = getattr(linear, "bias", None)
        packed = WQLinear.from_quantized(
            weight, bias, self.config.format, dtype=dtype or linear.weight.dtype
        )
        replace_module(root, name, packed)
        for twin in self.twins.get(full_name, ()):
            replace_module(self.model, twin, packed)


def _take_twins(plan: Plan, model: nn.Module) -> dict[str, list[str]]:
    """Takes linears whose weight an earlier one holds, too, out of the plan (zamba runs one block
    in several places).

    Returns the earlier one → the others. Quantized each by itself, they would get codes of their
    own and be stored twice.
    """
    owners: dict[tuple[int, int], str] = {}
    twins: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if name in plan.targets:
            tensors: Any = module
            first = owners.setdefault((id(tensors.weight), id(tensors.bias)), name)
            if first != name:
                twins.setdefault(first, []).append(name)

    plan.targets -= {name for names in twins.values() for name in names}
    return twins


def _shared_modules(model: nn.Module) -> frozenset[str]:
    """Names of modules whose weights have another name, too: the module stands in two places, or
    its parameters are tied."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name.rpartition(".")[0])
    return frozenset(name for found in owners.values() if len(found) > 1 for name in found)


@contextmanager
def moved_to(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The whole model on `device` for a while, where it fits: tuning sends gradients through all of
    it."""
    home = device_of(model)
    if home == device:
        yield
        return

    try:
        model.to(device)
    except torch.OutOfMemoryError:
        logger.warning(
            "the model does not fit on %s: it is tuned on %s, which takes long.", device, home
        )
        model.to(home)

    try:
        yield
    finally:
        model.to(home)


_settings_of_torch = threading.Lock()


@contextmanager
def one_at_a_time(device: torch.device, options: QuantizeOptions) -> Iterator[None]:
    """Quantizations that tune follow each other: deterministic algorithms and the kind of attention
    belong to the process, and two at once would leave them changed. So do those on GPUs, whose
    memory is made for one."""
    if device.type == "cpu" and not options.tuning:
        yield
        return
    with _settings_of_torch:
        yield


@contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """This thread's large float32 products in TF32 on an NVIDIA GPU, several times faster: losses
    move by 1e-4. Proofs of folds stay outside."""
    if not tf32.is_there(device):
        yield
        return

    with tf32.TensorCores():
        yield


def work_device(home: torch.device, options: QuantizeOptions) -> torch.device:
    """Where blocks are quantized; home: where the model is."""
    if options.device is not None:
        return torch.device(options.device)
    if home.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return home


def _batch_tokens(device: torch.device, widest: int) -> int:
    """Tokens of one forward; widest: inputs of the widest linear."""
    if device.type == "cpu":
        return BATCH_TOKENS
    return max(BATCH_TOKENS, GPU_BATCH_VALUES // widest)


def _model_inputs(model: nn.Module, batch: CalibrationBatch) -> dict[str, Tensor]:
    return {
        name: tensor.to(device_of(model))
        for name, tensor in _complete(model, batch).model_inputs().items()
    }


def _complete(model: nn.Module, batch: CalibrationBatch) -> CalibrationBatch:
    """The batch with what an encoder-decoder needs."""
    if batch.decoder:
        return batch

    inputs = with_decoder_inputs(model, batch.model_inputs())
    extra = {
        name: tensor
        for name, tensor in inputs.items()
        if name not in ("input_ids", "attention_mask")
    }

    return batch._replace(extra=extra)


def _warn_of_few_tokens(report: QuantReport, widest: int) -> None:
    enough = TOKENS_PER_CHANNEL * widest
    if report.tokens < enough:
        report.warnings.append(
            f"{report.tokens} calibration tokens are few for linears with {widest} inputs: codes "
            "are chosen more cautiously; "
            f"{enough} or more would be better."
        )


def _versions() -> dict[str, str]:
    import awq

    return {
        "autoawq": awq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
