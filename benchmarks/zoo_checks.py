"""What `zoo` asks of one kind of model, through the public interface, with transformers' own
forward as the judge.

Everything is in float32 with groups of 32, the preset "balanced" and random ids with masks:

- fold: random scales through the pipeline's own folds, without rounding, leave the model's output
as it was
- nearest: the quantized model's output is not further from the original's than with all of its
linears rounded to nearest
- names: with `.qweight` read as `.weight`, the tensors on disk are those of the original checkpoint
- reload_awq, reload_hf: `from_quantized` and transformers' own class give the output of the model
in memory
- generate: greedy tokens of a padded batch through the fused object are those of transformers' loop
on the unfused model
"""

from __future__ import annotations

import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from tiny_kinds import Kind, build, inputs, is_expert, is_linear
from torch import Tensor, nn

import awq
from awq.calibration import CalibrationBatch
from awq.checkpoint.match import current_keys
from awq.folds import apply_fold
from awq.models.base import AwqModel
from awq.nn.surgery import output_head
from awq.quantize.block import BlockQuantizer
from awq.quantize.pipeline import experts_as_linears
from awq.quantize.run import QuantizeRun

GROUP_SIZE = 32
NEW_TOKENS = 8
LIMITS = {"fold": 1e-3, "reload_awq": 1e-4, "reload_hf": 1e-4}  # of the output's norm
NEAREST_MARGIN = 1.05
NOISES, LAST_PLACE = 8, 3e-7  # to find tokens at a tie
MAX_TIES = 0.02  # of all tokens
CLASSIFIED = 8  # times the rows that other kinds are judged on
# of the text weights in 4 bits; what is left are low ranks and mixers that a full model hardly sees
FULL_SHARE = 0.9
# Reasons to stay dense that are not a lack: what engines dequantize, heads, and weights that a
# forward reads without a linear.
ON_PURPOSE = (
    "serving engines dequantize",
    "outside the repeated blocks",
    "its weight is read past its forward",
)
# a lack where they are experts, which people expect in 4 bits
BARE = "holds its weights in tensors of its own"
MAX_TIE = 1e-4  # in standard deviations of the logits: greedy search may take either

_TOWERS = re.compile(
    r"(^|\.)(vision|visual|audio|image|vit|vqmodel|speech|sam|talker|token2wav|code2wav|video|pixel|qformer|perceiver|resampler"
    r"|embed_vision|embed_audio|protein|acoustic|semantic|multi_modal_projector|mm_projector|projector|connector|aligner|modality"
    r"|mlp1|merger|word_timestamp|multimodal|abstractor|embed_tokens_extend)[a-z0-9_]*(\.|$)"
)
_OF_EXPERTS = re.compile(r"experts\.[a-z_0-9]*(bias|weight|scales|blocks)$")
_OF_ONE_EXPERT = re.compile(r"experts\.\d+\.")
_PREFIX_OF_EXPERT = re.compile(r".*experts\.\d+\.")
_NUMBERED = re.compile(r"(?<=\.)\d+\.")  # a number among the parts of a name
_NO_PRODUCT = re.compile(
    r"embed|position|A_log|conv|norm|latent|query|prompt|tokens|bias|table|registers|cls"
)  # names of matrices that nothing is multiplied by


@dataclass
class Result:
    """What was found out about one kind.

    share: of the text weights in 4 bits. left: reason → share of the text weights that are dense
    for it. folds: linears whose scale went into a producer, of all quantized ones. checks: name →
    figure or verdict. errors: step → message.
    """

    kind: Kind
    share: float = 0.0
    left: dict[str, float] = field(default_factory=dict)
    folds: tuple[int, int] = (0, 0)
    fusion: str = ""
    checks: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    step: str = "start"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        others = {name: value for name, value in self.__dict__.items() if name != "kind"}
        return {
            "type": self.kind.type,
            "role": self.kind.role,
            "class": self.kind.class_name,
            **others,
            "failed": self.failed(),
        }

    def failed(self) -> list[str]:
        """The steps and checks that are not as they should be."""
        found = list(self.errors)
        found += [
            name
            for name, limit in LIMITS.items()
            if self.checks.get(name) is not None and not self.checks[name] <= limit
        ]
        found += [
            name for name in ("nearest", "names", "generate") if self.checks.get(name) is False
        ]
        if (
            not {"build", "load", "quantize"}.intersection(found)
            and self.whole_share() < FULL_SHARE
        ):
            found.append("share")
        return found

    def whole_share(self) -> float:
        """The share in 4 bits and what is dense on purpose."""
        return self.share + sum(share for reason, share in self.left.items() if _on_purpose(reason))


def _on_purpose(reason: str) -> bool:
    return reason.startswith(ON_PURPOSE) or (BARE in reason and "expert" not in reason.lower())


def check(
    kind: Kind,
    work: Path,
    note: Callable[[Result], None] = lambda result: None,
    preset: str = "balanced",
    rows: int = 24,
) -> Result:
    """Builds, quantizes, saves and reloads one kind; what fails is in the result.

    work: an empty directory. note: told of the result before each step, for a process may end
    within one. preset: of
    `QuantizeOptions`. rows: of 64 tokens, that calibrate.
    """
    examination = _Examination(kind, work, Result(kind), note, preset, rows)
    examination.run()
    examination.result.step = "end"
    return examination.result


@dataclass
class _Examination:
    kind: Kind
    work: Path
    result: Result
    note: Callable[[Result], None]
    preset: str
    rows: int

    def run(self) -> None:
        model = self._try("build", self._build)
        if model is None:
            return
        wrapper = self._try("load", self._load)
        if wrapper is None or self._try("forward", lambda: self._outputs(wrapper.model)) is None:
            return
        self.original = self._outputs(wrapper.model)
        weights = text_weights(wrapper.model)
        report = self._try("quantize", lambda: self._quantize(wrapper, model))
        if report is None:
            return
        self._note_shares(report, weights)
        self.quantized = self._outputs(wrapper.model)
        self._try("nearest", lambda: self._compare_with_nearest(report))
        if (
            self._try("save", lambda: wrapper.save_quantized(self.work / "quantized") or True)
            is None
        ):
            return
        self._try("names", lambda: self._compare_names(wrapper.model, report))
        self._try("reload_hf", lambda: self._reload_with_transformers(type(wrapper.model)))
        unfused = self._try("reload_awq", self._reload)
        if self.kind.generates and unfused is not None:
            self._try("generate", lambda: self._generate(unfused))
        self._try("fold", self._fold)

    def _try(self, step: str, work: Callable[[], Any]) -> Any:
        """The value of one step, or None with its error noted."""
        start = time.process_time()
        self.result.step = step
        self.note(self.result)
        try:
            return work()
        except Exception as error:  # of anybody's model: a sweep goes on
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())[:300]
            place = f"{Path(where.filename).name}:{where.lineno}"
            self.result.errors[step] = f"{type(error).__name__}: {text} ({place})"
            return None
        finally:
            self.result.seconds[step] = round(time.process_time() - start, 2)

    # Steps

    def _build(self) -> nn.Module:
        model = build(self.kind)
        padding = "left" if self.kind.role in ("causal", "vlm") else "right"
        # A classifier gives a few numbers for a whole row, where others give a vector for a token.
        times = CLASSIFIED if self.kind.role == "seqcls" else 1
        self.tests = [
            inputs(self.kind, model, length=length, seed=seed + 2 * number, padding=padded)
            for number in range(times)
            for length, seed, padded in ((24, 11, padding), (40, 12, None))
        ]
        if not all(bool(output.isfinite().all()) for output in self._outputs(model)):
            raise ValueError("the tiny model's own output is not finite")
        model.save_pretrained(self.work / "dense")
        return model

    def _load(self) -> AwqModel:
        factory = (
            awq.AutoAWQForEmbedding
            if self.kind.class_name.endswith("EncoderModel")
            else awq.AutoAWQForCausalLM
        )
        return factory.from_pretrained(self.work / "dense")

    def _calibration(self, model: nn.Module) -> Any:
        item = inputs(self.kind, model, rows=self.rows, length=64, seed=3, padding="right")
        return {
            name: tensor
            for name, tensor in item.items()
            if name != "decoder_input_ids" or "input_ids" not in item
        }

    def _quantize(self, wrapper: AwqModel, model: nn.Module) -> Any:
        data = self._calibration(model)
        return wrapper.quantize(data, quant_config=_settings(), preset=self.preset, progress=False)

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        return [output_of(model, item) for item in self.tests]

    def _note_shares(self, report: Any, weights: dict[str, int]) -> None:
        """How much of the text weights is in 4 bits, and why the rest is not."""
        lines = [line for line in report.linears if not _TOWERS.search(f".{line.name}")]
        packed = sum(line.shape[0] * line.shape[1] for line in lines)
        total = max(1, sum(weights.values()))
        self.result.share = round(min(1.0, packed / total), 4)
        self.result.folds = (sum(line.producer is not None for line in lines), len(lines))
        left: Counter[str] = Counter()
        for name, count in weights.items():
            reason = report.skipped.get(
                name.removesuffix(".weight"), report.skipped.get(name.rpartition(".")[0])
            )
            if reason is not None:
                left[reason] += count
        for warning in report.warnings:
            if " stays dense: " in warning:
                left[warning.partition(" stays dense: ")[2]] += 0
        self.result.left = {
            reason: round(count / total, 4) for reason, count in left.most_common(6)
        }

    def _compare_with_nearest(self, report: Any) -> None:
        plain = self._load().model
        with experts_as_linears(plain):
            for line in report.linears:
                linear: Any = plain.get_submodule(line.name)
                turned = type(linear).__name__ == "Conv1D"
                weight = linear.weight.data.t() if turned else linear.weight.data
                nearest = rounded_to_nearest(weight)
                linear.weight.data.copy_(nearest.t() if turned else nearest)
            nearest_outputs = self._outputs(plain)
        ours = mean_distance(self.quantized, self.original)
        theirs = mean_distance(nearest_outputs, self.original)
        self.result.checks["error"], self.result.checks["error_nearest"] = (
            round(ours, 5),
            round(theirs, 5),
        )
        self.result.checks["nearest"] = ours <= NEAREST_MARGIN * theirs + 1e-6

    def _compare_names(self, model: nn.Module, report: Any) -> None:
        before = without_identities(tensor_names(self.work / "dense"))
        after = without_identities(tensor_names(self.work / "quantized"))
        fused = {
            name
            for name, dimensions in before.items()
            if dimensions == 3 or _OF_EXPERTS.search(name)
        }
        owners = parted(before, after)
        fused |= {name for name in before if name.startswith(owners)}
        if fused - set(after):  # one linear for each expert, as serving engines read such types
            self.result.checks["experts_parted"] = True
            after = {
                name: dimensions
                for name, dimensions in after.items()
                if not _OF_ONE_EXPERT.search(name) and not name.startswith(owners)
            }
            before = {
                name: dimensions
                for name, dimensions in before.items()
                if name not in fused or name in after
            }
        missing, new = set(before) - set(after), set(after) - set(before)
        # a tensor that is nobody's weight or bias, where packed linears have the model's names
        bare = {name for name in missing if not name.endswith((".weight", ".bias"))}
        own = {f"{line.name}.{leaf}" for line in report.linears for leaf in ("weight", "bias")}
        joined = {name for name in bare if set(current_keys(model, [name])) <= own}
        if joined:
            self.result.checks["bare_in_source"] = True
            missing, new = missing - joined, new - own
        self.result.checks["names"] = not missing and not new
        if missing or new:
            self.result.checks["names_missing"] = sorted(missing)[:4]
            self.result.checks["names_new"] = sorted(new)[:4]

    def _reload(self) -> AwqModel:
        factory = (
            awq.AutoAWQForEmbedding
            if self.kind.class_name.endswith("EncoderModel")
            else awq.AutoAWQForCausalLM
        )
        loaded = factory.from_quantized(self.work / "quantized", fuse_layers=False, device="cpu")
        self.result.checks["reload_awq"] = worst_distance(
            self._outputs(loaded.model), self.quantized
        )
        return loaded

    def _reload_with_transformers(self, model_class: Any) -> None:
        """Through the Auto class of the role, where that gives the class which was quantized; else
        through that class."""
        chosen = _auto_class(self.kind.role)
        config = transformers.AutoConfig.from_pretrained(self.work / "dense")
        if (
            type(config) not in chosen._model_mapping
            or chosen._model_mapping[type(config)] is not model_class
        ):
            chosen = model_class
        model = chosen.from_pretrained(self.work / "quantized").eval()
        self.result.checks["reload_hf"] = worst_distance(self._outputs(model), self.quantized)

    def _generate(self, unfused: AwqModel) -> None:
        padding = "right" if self.kind.role == "seq2seq" else "left"
        item = inputs(self.kind, unfused.model, rows=3, length=12, seed=21, padding=padding)
        item.pop("decoder_input_ids", None)
        settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        fused = awq.AutoAWQForCausalLM.from_quantized(
            self.work / "quantized", device="cpu", max_seq_len=64
        )
        try:
            theirs = unfused.model.generate(
                **item, **settings, return_dict_in_generate=True, output_scores=True
            )
        except Exception as error:  # then the type generates neither way
            self.result.checks["generate_of_transformers"] = (
                f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            )
            return
        try:
            ours = fused.generate(**item, **settings)
        finally:
            self.result.fusion = str(fused.fusion)
        # Whisper cuts its prompt off, unless it is asked for scores.
        plain = unfused.model.generate(**item, **settings)
        same = torch.equal(ours, plain) or same_tokens(ours, theirs)
        self.result.checks["generate"] = same

    def _fold(self) -> None:
        """The function stays where every fold takes a random scale and nothing is rounded."""
        model = self._load().model
        found = self._calibration(model)
        batch = (
            CalibrationBatch(found["input_ids"], found["attention_mask"])
            if "input_ids" in found
            else None
        )
        if batch is None:
            return
        config, options = (
            awq.AwqConfig(group_size=GROUP_SIZE),
            awq.QuantizeOptions(preset="fast", progress=False),
        )
        generator = torch.Generator().manual_seed(5)
        folded = 0
        with torch.no_grad(), experts_as_linears(model):
            run = QuantizeRun.start(model, [batch], config, options)
            for visit in run.walk():
                block = BlockQuantizer(run, visit)
                block.find_folds()
                for group in block.groups:
                    if group.fold is not None:
                        scale = torch.rand(group.in_features, generator=generator) * 1.5 + 0.5
                        apply_fold(visit.block, group.fold, group.fold.tie(scale))
                        folded += 1
                visit.advance()
        if folded:
            self.result.checks["fold"] = self._distance_beside_ties(self._outputs(model))

    def _distance_beside_ties(self, outputs: list[Tensor]) -> float:
        """To the original's outputs, without tokens at a tie: a router or an index chooses
        otherwise for them when rounding alone differs."""
        found = worst_distance(outputs, self.original)
        if found <= LIMITS["fold"]:
            return found

        steady = self._steady_tokens()
        ties = sum(int((~rows).sum()) for rows in steady)
        if ties > MAX_TIES * sum(map(len, steady)):
            return found

        self.result.checks["ties"] = ties
        ours = [output[rows] for output, rows in zip(outputs, steady)]
        return worst_distance(ours, [output[rows] for output, rows in zip(self.original, steady)])

    def _steady_tokens(self) -> list[Tensor]:
        """Of every output, bool [tokens]: which stay where they are while all weights change by
        some units of float32's last place."""
        model = self._load().model
        weights = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
        steady = [torch.ones(len(output), dtype=torch.bool) for output in self.original]
        for seed in range(NOISES):
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = weights[name] * (1 + LAST_PLACE * noise)
            for rows, output, original in zip(steady, self._outputs(model), self.original):
                change = (output - original).norm(dim=-1) / original.norm(dim=-1)
                rows &= change <= LIMITS["fold"]
        return steady


def _settings() -> dict[str, Any]:
    return {"zero_point": True, "q_group_size": GROUP_SIZE, "w_bit": 4, "version": "GEMM"}


def _auto_class(role: str) -> Any:
    names = {
        "causal": "AutoModelForCausalLM",
        "vlm": "AutoModelForMultimodalLM",
        "seq2seq": "AutoModelForSeq2SeqLM",
        "encoder": "AutoModel",
        "seqcls": "AutoModelForSequenceClassification",
    }
    return getattr(transformers, names[role], transformers.AutoModelForImageTextToText)


# Measures


def output_of(model: nn.Module, item: dict[str, Tensor]) -> Tensor:
    """Logits or hidden states of real tokens, float32 [tokens, features]."""
    with torch.no_grad():
        output = model(**item)
    found = next(
        (
            output[key]
            for key in ("logits", "last_hidden_state", "prediction_logits")
            if output.get(key) is not None
        ),
        None,
    )
    found = (output[0] if found is None else found).float()
    mask = item.get("attention_mask")
    if mask is not None and found.dim() == 3 and found.shape[:2] == mask.shape:
        found = found[mask.bool()]
    return found.reshape(-1, found.shape[-1])


def distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference as a share of b's; infinite for other shapes and what is no number."""
    if a.shape != b.shape:
        return float("inf")
    found = float((a - b).norm() / b.norm().clamp(min=1e-20))
    return found if found == found else float("inf")


def worst_distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(distance(a, b) for a, b in zip(ours, theirs))


def mean_distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return sum(distance(a, b) for a, b in zip(ours, theirs)) / len(theirs)


def rounded_to_nearest(weight: Tensor) -> Tensor:
    """[out, in] with asymmetric 4-bit groups, by arithmetic of its own."""
    rows, columns = weight.shape
    groups = weight.float().reshape(rows, columns // GROUP_SIZE, GROUP_SIZE)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / 15
    zero = (-(low / scale).round()).clamp(0, 15)
    codes = ((groups / scale).round() + zero).clamp(0, 15)
    return ((codes - zero) * scale).reshape(rows, columns).to(weight.dtype)


def same_tokens(ours: Tensor, theirs: Any) -> bool:
    """Whether greedy tokens are equal, or part at a tie of the logits."""
    if torch.equal(ours, theirs.sequences):
        return True
    if ours.shape != theirs.sequences.shape:
        return False
    start = ours.shape[1] - len(theirs.scores)
    for row, (a, b) in enumerate(zip(ours, theirs.sequences)):
        places = (a != b).nonzero().flatten()
        if (
            len(places)
            and _gap(theirs.scores[int(places[0]) - start][row], a[places[0]], b[places[0]])
            > MAX_TIE
        ):
            return False
    return True


def _gap(scores: Tensor, a: Tensor, b: Tensor) -> float:
    finite = scores[scores.isfinite()]
    return float(scores[b] - scores[a]) / float(finite.std())


def tensor_names(directory: Path) -> dict[str, int]:
    """Tensor → number of its dimensions in the files of a checkpoint, packed ones under the names
    of their weights."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: len(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    packed = {name.removesuffix(".qweight") for name in found if name.endswith(".qweight")}
    parts = {f"{name}.{part}" for name in packed for part in ("qweight", "qzeros", "scales")}
    return {name: count for name, count in found.items() if name not in parts} | {
        f"{name}.weight": 2 for name in packed
    }


def without_identities(names: dict[str, int]) -> dict[str, int]:
    """Without experts of fewer tensors than their siblings: those that hand their input on hold no
    weights, but transformers writes rows for them where their siblings' are one tensor."""
    tensors = Counter(match[0] for name in names if (match := _PREFIX_OF_EXPERT.match(name)))
    most: Counter[str] = Counter()
    for prefix, count in tensors.items():
        siblings = prefix.rpartition("experts.")[0]
        most[siblings] = max(most[siblings], count)

    def is_whole(name: str) -> bool:
        match = _PREFIX_OF_EXPERT.match(name)
        return match is None or tensors[match[0]] == most[match[0].rpartition("experts.")[0]]

    return {name: count for name, count in names.items() if is_whole(name)}


def parted(before: Iterable[str], after: Iterable[str]) -> tuple[str, ...]:
    """Beginnings of names below which the source has tensors of all experts and ours one module for
    each."""

    def numbered_below(names: Iterable[str]) -> set[str]:
        return {name[: found.start()] for name in names for found in _NUMBERED.finditer(name)}

    numbered = numbered_below(after) - numbered_below(before)
    return tuple(sorted(o for o in numbered if any(name.startswith(o) for name in before)))


def text_weights(model: Any) -> dict[str, int]:
    """Name → number of values of every matrix of the language part that something is multiplied by.

    Without embeddings, output head and routers; bare matrices and 3-D experts count.
    """
    return {name: parameter.numel() for name, parameter in _text_matrices(model)}


def _text_matrices(model: Any) -> Iterator[tuple[str, Tensor]]:
    ends = {id(parameter) for module in _ends(model) for parameter in module.parameters()}
    seen: set[int] = set()
    has_inner = any(name.endswith("language_model") for name, _ in model.named_modules())
    for name, module in model.named_modules():
        kind = type(module).__name__
        is_tower = _TOWERS.search(f".{name}") or (
            has_inner and re.search(r"\.encoder\.|projectors", name)
        )
        if (
            isinstance(module, nn.Embedding)
            or ("conv" in kind.lower() and kind != "Conv1D")
            or is_tower
        ):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen | ends or parameter.dim() < 2:
                continue
            seen.add(id(parameter))
            if _multiplies(name, module, leaf, parameter):
                yield f"{name}.{leaf}", parameter


def _ends(model: Any) -> list[nn.Module]:
    """Embeddings and output head."""
    found: list[Any] = [output_head(model)]
    with suppress(Exception):  # some have none of one name
        found.append(model.get_input_embeddings())
    return [module for module in found if isinstance(module, nn.Module)]


def _multiplies(name: str, module: nn.Module, leaf: str, parameter: Tensor) -> bool:
    full = f"{name}.{leaf}".lower()
    if is_expert(name, module, leaf, parameter):
        return True
    if parameter.dim() != 2:
        return False
    is_router = (
        re.search(r"rout|(^|\.)gate(\.weight)?$|shared_expert_gate", full)
        and min(parameter.shape) <= 512
    )
    if is_linear(module) and leaf == "weight":
        return not is_router
    return min(parameter.shape) > 1 and not is_router and not _NO_PRODUCT.search(full)
