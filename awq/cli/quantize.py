"""Quantize a model directory or hub id to 4-bit AWQ; sentence-transformers models are calibrated
and judged as such."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from awq.cli.arguments import (
    PRESETS,
    add_device,
    add_dtype,
    add_gates,
    add_version,
    gates_of,
    group_size,
    only_text,
    positive,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="local directory or hub id")
    parser.add_argument("output", nargs="?", help="directory to write")
    parser.add_argument(
        "--calib-data",
        default="pileval",
        help="dataset name or local .txt, .jsonl, .csv, .parquet file",
    )
    parser.add_argument(
        "--text-column", default="text", help="column of a table that holds the texts"
    )
    parser.add_argument("--split", default="train", help="of a dataset of the hub")
    parser.add_argument(
        "--group-size",
        type=group_size,
        default=128,
        help="input channels that share a scale; -1: the whole row",
    )
    add_version(parser, default="GEMM")
    parser.add_argument(
        "--preset", choices=PRESETS, default="balanced", help="how much work to spend on quality"
    )
    parser.add_argument(
        "--samples",
        type=positive,
        help="texts; default: 128, or 256, 1024 or 2048 by size for an embedding model",
    )
    parser.add_argument("--tokens", type=positive, default=512, help="tokens per sample")
    add_dtype(parser)
    add_device(parser)
    parser.add_argument("--skip", nargs="*", default=[], help="modules to leave in full precision")
    parser.add_argument(
        "--evaluate",
        metavar="FILE",
        action="append",
        help="text to compare a language model before and after on (KL, flips, "
        "perplexity), once for each kind of text; for an embedding model texts, or .tsv lines "
        "`score<TAB>sentence<TAB>sentence`, default: "
        "texts that calibration left over",
    )
    parser.add_argument(
        "--evaluate-tokens",
        type=positive,
        default=16384,
        help="at most so many of each of a language model's texts",
    )
    parser.add_argument(
        "--prompt-name", help="prompt put before every text of an embedding model, e.g. query"
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="hold one block in memory at a time, for models larger than memory (no --evaluate)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only say what would be quantized, the size before and after, what memory, disk and "
        "time that takes, and how far engines can split the result",
    )
    parser.add_argument(
        "--resume",
        metavar="OUTPUT",
        help="go on with a --stream into OUTPUT that ended early, with all of its options",
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="send the saved directory to this repository of the hub, unless a gate failed; needs "
        "a token (`hf auth login`)",
    )
    parser.add_argument(
        "--private", action="store_true", help="with --push: a new repository is private"
    )
    add_gates(parser)


@contextmanager
def _signs_of_life(quiet: bool) -> Iterator[logging.Logger]:
    """A logger that writes lines with the time to stderr where no progress bar is drawn: log files,
    nohup, CI."""
    steps = logging.getLogger("awq.quantize")
    if quiet or sys.stderr.isatty():
        yield steps
        return

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    level = steps.level
    steps.addHandler(handler)
    steps.setLevel(logging.INFO)

    try:
        yield steps
    finally:
        steps.removeHandler(handler)
        steps.setLevel(level)


def run(arguments: argparse.Namespace) -> int:
    from awq.core.team import several_processes, was_started_in_a_team

    if not was_started_in_a_team():
        return _run(arguments)
    with several_processes() as team:
        arguments.quiet |= team.rank > 0
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    with _signs_of_life(arguments.quiet) as steps:
        if arguments.dry_run:
            return _plan(arguments)

        _check_names(arguments)
        _check_push(arguments)
        if arguments.resume is not None:
            return _resume(arguments)
        return _stream(arguments, steps) if arguments.stream else _quantize(arguments, steps)


def _plan(arguments: argparse.Namespace) -> int:
    from awq import plan_quantization
    from awq.cli.output import OK, show
    from awq.core.team import present_team
    from awq.errors import ConfigError

    if present_team().rank > 0:
        return OK
    if arguments.model is None:
        raise ConfigError("give the model to plan for.")

    settings = _settings(arguments)
    planned = ("quant_config", "preset", "device", "max_calib_samples", "max_calib_seq_len")
    plan = plan_quantization(
        arguments.model,
        arguments.output,
        torch_dtype=arguments.dtype,
        **{name: settings[name] for name in planned if name in settings},
    )
    show(plan.to_dict(), arguments.json, plan.summary())

    return OK


def _check_names(arguments: argparse.Namespace) -> None:
    from awq.errors import ConfigError

    if arguments.resume is None and arguments.output is None:
        raise ConfigError("give a model and the directory to write (or --resume OUTPUT alone).")
    if arguments.resume is not None and arguments.model is not None:
        raise ConfigError("--resume takes the model and all options from the run that ended early.")


def _check_push(arguments: argparse.Namespace) -> None:
    """Refuses a repository that could not be written to, before hours of work."""
    from awq.errors import ConfigError

    if arguments.push is not None:
        from awq.checkpoint.hub import check_push

        check_push(arguments.push)
    elif arguments.private:
        raise ConfigError("--private is of the repository that --push names.")


def _resume(arguments: argparse.Namespace) -> int:
    from awq.cli.output import OK
    from awq.models.streaming import resume_quantization

    arguments.output = arguments.resume
    _show(resume_quantization(arguments.resume), arguments)
    return OK


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `quantize` that every way of quantizing takes."""
    settings: dict[str, Any] = {
        "quant_config": {
            "q_group_size": arguments.group_size,
            "version": arguments.version,
            "modules_to_not_convert": arguments.skip,
        },
        "calib_data": arguments.calib_data,
        "split": arguments.split,
        "text_column": arguments.text_column,
        "max_calib_seq_len": arguments.tokens,
        "preset": arguments.preset,
    }
    if arguments.device is not None:
        settings["device"] = arguments.device
    if arguments.quiet:
        settings["progress"] = False
    if arguments.samples is not None:
        settings["max_calib_samples"] = arguments.samples
    if arguments.prompt_name is not None:
        settings["prompt_name"] = arguments.prompt_name

    return settings


def _tell_settings(arguments: argparse.Namespace, steps: logging.Logger) -> None:
    steps.info(
        "quantizing: preset %s, group size %d, texts of %s",
        arguments.preset,
        arguments.group_size,
        arguments.calib_data,
    )


def _show(report: Any, arguments: argparse.Namespace, keeps_gates: bool = True) -> None:
    """Prints the result, after sending it where `--push` says. Of several processes one does."""
    from awq.cli.output import show
    from awq.core.team import present_team

    if present_team().rank > 0:
        return

    result = report.to_dict() | {"output": arguments.output}
    lines = [report.summary(), f"saved to {arguments.output}"]
    if arguments.push is not None and keeps_gates:
        result["pushed"] = _push(arguments)
        lines.append(f"pushed to {result['pushed']}")

    show(result, arguments.json, "\n".join(lines))


def _push(arguments: argparse.Namespace) -> str:
    from awq.checkpoint.hub import push_directory
    from awq.errors import CheckpointError

    try:
        return push_directory(arguments.output, arguments.push, private=arguments.private)
    except CheckpointError as error:
        later = shlex.join(["hf", "upload", arguments.push, arguments.output])
        raise CheckpointError(f"{error} The model is saved; `{later}` sends it later.") from error


def _stream(arguments: argparse.Namespace, steps: logging.Logger) -> int:
    """Block by block, for models larger than memory."""
    from awq import quantize_directory
    from awq.cli.output import OK
    from awq.errors import ConfigError

    if arguments.evaluate is not None or gates_of(arguments).wanted:
        raise ConfigError(
            "--evaluate and its gates need the whole model in memory, and --stream holds one block "
            "of it; use `awq eval` afterwards."
        )

    _tell_settings(arguments, steps)
    report = quantize_directory(
        arguments.model,
        arguments.output,
        torch_dtype=arguments.dtype,
        command=shlex.join(arguments.command_line),
        **_settings(arguments),
    )
    _show(report, arguments)

    return OK


def _quantize(arguments: argparse.Namespace, steps: logging.Logger) -> int:
    from awq import AutoAWQForCausalLM, AutoAWQForEmbedding
    from awq.checkpoint.directory import check_target
    from awq.checkpoint.tokenizer import load_tokenizer
    from awq.cli.output import FAILED_GATE, OK, failed_gates
    from awq.core.team import present_team
    from awq.embed.directory import is_sentence_model
    from awq.errors import ConfigError

    check_target(arguments.output, arguments.model)  # before hours of work that nobody could keep
    embedding = is_sentence_model(arguments.model)
    if arguments.prompt_name is not None and not embedding:
        raise ConfigError(
            f"--prompt-name: for embedding models, and {arguments.model} is no such directory."
        )

    gates = gates_of(arguments)
    gates.check(embedding, arguments.evaluate is not None)

    options: dict[str, Any] = {}
    if embedding:
        options["evaluate"] = _evaluation(arguments)
    elif arguments.evaluate is not None:
        _evaluation_ids(arguments)  # a bad file is said before hours of work

    steps.info("loading %s", arguments.model)
    door = AutoAWQForEmbedding if embedding else AutoAWQForCausalLM
    model = door.from_pretrained(arguments.model, torch_dtype=arguments.dtype)
    model.tokenizer = load_tokenizer(arguments.model)
    _tell_settings(arguments, steps)
    report = model.quantize(model.tokenizer, **_settings(arguments), **options)
    team = present_team()
    if team.rank > 0:
        team.wait()  # for the one that compares and saves
        return OK

    if not embedding and arguments.evaluate is not None:
        steps.info("comparing with the original on %s", ", ".join(arguments.evaluate))
        report.evaluation = _moved(arguments, model)

    report.command = shlex.join(arguments.command_line)
    steps.info("saving to %s", arguments.output)
    model.save_quantized(arguments.output)
    team.wait()
    figures = report.evaluation.to_dict() if report.evaluation is not None else {}
    failures = gates.failures(figures)
    _show(report, arguments, keeps_gates=not failures)

    return FAILED_GATE if failed_gates("quantize", failures) else OK


def _moved(arguments: argparse.Namespace, model: Any) -> Any:
    """How far the quantized language model's predictions moved from the original's, on each text
    of `--evaluate`."""
    from transformers import AutoModelForCausalLM

    from awq.checkpoint import load_model
    from awq.evals.by_text import by_text
    from awq.evals.divergence import divergence

    texts = _evaluation_ids(arguments)
    original = load_model(arguments.model, arguments.dtype, kind=AutoModelForCausalLM).to(
        model.device
    )
    limit = arguments.evaluate_tokens

    return by_text(
        {name: divergence(original, model, ids, limit=limit) for name, ids in texts.items()}
    )


def _evaluation_ids(arguments: argparse.Namespace) -> dict[str, Any]:
    """File of `--evaluate` → its token ids."""
    from awq.errors import ConfigError
    from awq.evals.models import MIN_TEXTS, is_language_model, token_ids

    if not is_language_model(arguments.model):
        raise ConfigError(
            f"--evaluate: {arguments.model} is neither a language model nor a "
            "sentence-transformers directory."
        )

    found = {}
    for text in arguments.evaluate:
        ids = token_ids(arguments.model, text, arguments.text_column)
        if len(ids) < MIN_TEXTS:
            raise ConfigError(f"{text} has {len(ids)} tokens; a comparison needs at least 2.")
        found[text] = ids

    return found


def _evaluation(arguments: argparse.Namespace) -> Any:
    """What `--evaluate` names: (scores, first, second) of a .tsv file, texts of any other; None
    when not given."""
    if arguments.evaluate is None:
        return None

    from pathlib import Path

    from awq.errors import CalibrationError
    from awq.evals.models import scored_pairs, texts_to_compare

    path = Path(only_text("--evaluate", arguments.evaluate))
    if not path.is_file():
        raise CalibrationError(f"evaluation file {path} does not exist.")
    if path.suffix.lower() != ".tsv":
        return texts_to_compare(path, arguments.text_column)
    return scored_pairs(path)
