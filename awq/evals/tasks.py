"""Benchmark tasks through the packages that define them: lm-eval for language models, MTEB for
embedding models.

Their own code runs the tasks, so scores compare with published ones. This module only starts them
with this package loaded, which lets them read quantized directories, and returns plain numbers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from awq.errors import ConfigError
from awq.nn.surgery import usable_device


def language_model_scores(
    model: str | Path,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
) -> dict[str, dict[str, float]]:
    """Task → metric → value, by lm-eval's `simple_evaluate`.

    tasks: names that lm-eval knows, or those of YAML files in `include_path`. limit: documents of
    each task. Raises ConfigError when lm-eval is not installed or knows no such task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("tasks need lm-eval: pip install lm-eval.")

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import awq  # noqa: F401 - lets lm-eval load quantized directories

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(
            f"lm-eval knows no task {', '.join(unknown)}; `lm_eval ls tasks` lists them."
        )

    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": dtype},
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        batch_size=batch_size,
        device=str(usable_device(device)),  # without one, lm-eval asks for a GPU
        bootstrap_iters=1000,
    )
    return {name: _numbers(values) for name, values in found["results"].items()}


def embedding_scores(
    model: str | Path,
    tasks: Sequence[str],
    device: str | None = None,
) -> dict[str, dict[str, float]]:
    """Task → {"main_score": value}, by `mteb.evaluate` through SentenceTransformer.

    Raises ConfigError when mteb or sentence-transformers is not installed, or when mteb knows no
    such task.
    """
    missing = [
        name for name in ("mteb", "sentence_transformers") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ConfigError(
            f"tasks of embedding models need {' and '.join(missing)}: pip install mteb "
            "sentence-transformers."
        )

    import mteb
    from sentence_transformers import SentenceTransformer

    import awq  # noqa: F401 - lets SentenceTransformer load quantized directories

    try:
        chosen = [mteb.get_task(name) for name in tasks]
    except KeyError as error:
        raise ConfigError(f"mteb knows no such task: {' '.join(str(error).split())}") from error

    encoder = SentenceTransformer(str(model), device=device)
    # No cache: MTEB's goes by a model's name, and local directories share one.
    found = mteb.evaluate(encoder, chosen, cache=None, show_progress_bar=False)

    return {
        result.task_name: {"main_score": float(result.get_score())} for result in found.task_results
    }


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Metrics of one task by their own name: "acc,none" is lm-eval's spelling of acc without a
    filter."""
    kept = {}
    for name, value in values.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "sample_len":
            kept[name.removesuffix(",none")] = float(value)
    return kept
