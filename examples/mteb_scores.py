"""MTEB scores of a model before and after quantization; `pip install mteb` first.

`python examples/mteb_scores.py ORIGINAL QUANTIZED --tasks STS12 SciFact`, or, where no hub can be
reached, `--pairs FILE` with lines `score<TAB>sentence<TAB>sentence` as a task of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import SentenceTransformer

import awq  # noqa: F401 - lets SentenceTransformer read quantized directories
from awq.evals.similarity import read_pairs


class LocalPairs(AbsTaskSTS):
    """Sentence pairs of a local file as an MTEB task."""

    metadata = TaskMetadata(
        name="LocalPairs",
        description="Sentence pairs of a local file.",
        dataset={"path": "local", "revision": "1"},
        type="STS",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="cosine_spearman",
        reference=None,
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation=None,
    )
    min_score, max_score = 0, 5

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = path

    def load_data(self, *_args, **_kwargs) -> None:
        scores, first, second = read_pairs(self.path)
        rows = Dataset.from_dict({"sentence1": first, "sentence2": second, "score": scores})
        self.dataset, self.data_loaded = DatasetDict({"test": rows}), True


def scores(directory: str, tasks: list) -> dict[str, float]:
    """Main score of each task. No cache: MTEB's goes by model name, and local models share one."""
    found = mteb.evaluate(
        SentenceTransformer(directory), tasks, cache=None, show_progress_bar=False
    )
    return {result.task_name: float(result.get_score()) for result in found.task_results}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("original")
    parser.add_argument("quantized")
    parser.add_argument("--tasks", nargs="+", default=[])
    parser.add_argument("--pairs")
    arguments = parser.parse_args()
    tasks = [*mteb.get_tasks(tasks=arguments.tasks)] if arguments.tasks else []
    tasks += [LocalPairs(arguments.pairs)] if arguments.pairs else []
    before, after = (
        scores(directory, tasks) for directory in (arguments.original, arguments.quantized)
    )
    for name, score in before.items():
        print(f"{name}: {100 * score:.2f} before, {100 * after[name]:.2f} after")


if __name__ == "__main__":
    main()
