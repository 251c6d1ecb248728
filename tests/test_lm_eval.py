"""`awq eval --tasks` through lm-eval on a task file of one's own, without a network."""

import json

import pytest

from awq.cli import main

pytest.importorskip("lm_eval", reason="lm_eval is not installed")

TASK = """
task: animals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - metric: acc
"""


@pytest.fixture
def tasks(tmp_path):
    questions = [
        {"question": "the old dog", "choices": ["runs", "sleeps"], "gold": gold}
        for gold in (0, 1, 1)
    ]
    (tmp_path / "animals.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "animals.yaml").write_text(TASK.format(file=tmp_path / "animals.jsonl"))
    return tmp_path


def test_both_models_on_a_local_task(llama_dir, texts, tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))
    quantize = ["quantize", llama_dir, tmp_path / "q", "--calib-data", tmp_path / "texts.txt"]
    assert main([*map(str, quantize), "--group-size", "16", "--preset", "fast"]) == 0
    capsys.readouterr()
    command = ["eval", tmp_path / "q", "--base", llama_dir, "--include-path", tasks, "--json"]
    assert main([*map(str, command), "--tasks", "animals"]) == 0
    found = json.loads(capsys.readouterr().out)["tasks"]
    # One question three times, with either answer right: a model gets one or two of three.
    for role in ("base", "model"):
        assert found[role]["animals"]["acc"] in (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert main([*map(str, command), "--tasks", "plants"]) == 2
    assert "lm-eval knows no task plants" in capsys.readouterr().err
