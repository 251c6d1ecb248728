"""Measure a model: KL, flips and perplexity of a language model, drift and rank correlation of an
embedding model.

With --base the full-precision original is measured on the same text, and the figures stand side by
side. --tasks runs benchmark tasks through lm-eval (language models) or mteb (embedding models),
which must be installed.
"""

from __future__ import annotations

import argparse
from typing import Any

from awq.cli.arguments import add_device, add_dtype, add_gates, gates_of, only_text, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="directory or hub id, quantized or not")
    parser.add_argument("--base", help="the full-precision original, to compare with")
    parser.add_argument(
        "--text",
        metavar="FILE",
        action="append",
        help="text to measure on (.txt, .jsonl, .csv, .parquet), or for an embedding "
        "model .tsv lines `score<TAB>sentence<TAB>sentence`; a language model takes the option "
        "once for each kind of text",
    )
    parser.add_argument(
        "--text-column", default="text", help="column of a table that holds the texts"
    )
    parser.add_argument(
        "--window", type=positive, default=1024, help="tokens read together; windows do not overlap"
    )
    parser.add_argument(
        "--limit", type=positive, help="at most so many tokens of a text, or documents of a task"
    )
    parser.add_argument(
        "--prompt-name", help="prompt put before every text of an embedding model, e.g. query"
    )
    parser.add_argument(
        "--tasks", nargs="+", default=[], help="tasks of lm-eval, or of mteb for an embedding model"
    )
    parser.add_argument(
        "--include-path", metavar="DIR", help="folder with task files of your own for lm-eval"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=8, help="documents that lm-eval runs together"
    )
    add_gates(parser)
    add_dtype(parser)
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    from awq.cli.output import FAILED_GATE, OK, failed_gates, show
    from awq.errors import ConfigError
    from awq.evals.models import is_language_model

    gates = gates_of(arguments)
    if arguments.text is None and not arguments.tasks:
        raise ConfigError("nothing to measure on; give --text FILE, or --tasks.")
    if gates.wanted and (arguments.text is None or arguments.base is None):
        raise ConfigError("gates compare with the original: give --base and --text.")

    language = is_language_model(arguments.model)
    gates.check(not language, True)
    result: dict[str, Any] = {"model": arguments.model, "base": arguments.base}

    lines: list[str] = []
    failures: list[str] = []
    if arguments.text is not None:
        found = _on_text(arguments) if language else _on_pairs(arguments)
        result["text"] = arguments.text[0] if len(arguments.text) == 1 else arguments.text
        result["figures"] = found.to_dict()
        lines.append(found.summary())
        failures = gates.failures(found.to_dict())

    if arguments.tasks:
        result["tasks"] = _on_tasks(arguments, language)
        lines += _task_lines(result["tasks"])

    result["failed_gates"] = failures
    show(result, arguments.json, "\n".join(lines))

    return FAILED_GATE if failed_gates("eval", failures) else OK


def _on_text(arguments: argparse.Namespace) -> Any:
    from awq.evals.by_text import by_text
    from awq.evals.models import evaluate_texts, token_ids

    ids = {text: token_ids(arguments.model, text, arguments.text_column) for text in arguments.text}
    figures = evaluate_texts(
        arguments.model,
        ids,
        arguments.base,
        arguments.window,
        arguments.limit,
        arguments.dtype,
        arguments.device,
    )

    return by_text(figures)


def _on_pairs(arguments: argparse.Namespace) -> Any:
    from awq.evals.models import evaluate_embeddings

    return evaluate_embeddings(
        arguments.model,
        only_text("--text", arguments.text),
        arguments.base,
        arguments.text_column,
        arguments.prompt_name,
        arguments.dtype,
        arguments.device,
    )


def _on_tasks(
    arguments: argparse.Namespace, language: bool
) -> dict[str, dict[str, dict[str, float]]]:
    """{"base", "model"} → task → metric → value; base only when it is given."""
    from awq.evals.tasks import embedding_scores, language_model_scores

    places = {"base": arguments.base, "model": arguments.model}
    found = {}
    for role, place in places.items():
        if place is None:
            continue
        if language:
            found[role] = language_model_scores(
                place,
                arguments.tasks,
                arguments.include_path,
                arguments.limit,
                arguments.batch_size,
                arguments.dtype,
                arguments.device,
            )
        else:
            found[role] = embedding_scores(place, arguments.tasks, arguments.device)

    return found


def _task_lines(scores: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    lines = []
    for task, metrics in scores["model"].items():
        for metric, value in metrics.items():
            if "stderr" in metric:
                continue
            before = scores.get("base", {}).get(task, {}).get(metric)
            beside = "" if before is None else f" (base {before:.4f})"
            lines.append(f"{task} {metric}: {value:.4f}{beside}")
    return lines
