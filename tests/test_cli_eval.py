"""The verbs that judge and talk: eval, compare, chat, env, completion, and the quality gates of
quantize."""

import io
import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from awq.cli import main
from awq.errors import ConfigError
from awq.evals.gates import Gates

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if "
    "add_generation_prompt %}old {% endif %}"
)


def run_json(capsys, *arguments, status=0):
    """A verb's result; stdout must be one JSON document and nothing else."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == status
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def place(llama_dir, bert_dir, texts, tmp_path_factory):
    """A folder with a dense and a quantized language model (`llama`, `llama-awq`), `bert-awq`, and
    files of texts."""
    root = tmp_path_factory.mktemp("judge")
    shutil.copytree(llama_dir, root / "llama")
    tokenizer = AutoTokenizer.from_pretrained(root / "llama")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "llama")
    (root / "texts.txt").write_text("\n\n".join(texts))
    (root / "pairs.tsv").write_text(
        "".join(f"{i % 6}\t{a}\t{b}\n" for i, (a, b) in enumerate(zip(texts, texts[30:])))
    )
    for name, source in (("llama", root / "llama"), ("bert", bert_dir)):
        common = [
            "--calib-data",
            root / "texts.txt",
            "--group-size",
            16,
            "--tokens",
            32,
            "--preset",
            "fast",
            "--quiet",
        ]
        assert main(["quantize", str(source), str(root / f"{name}-awq"), *map(str, common)]) == 0
    return root


def test_perplexity_is_transformers_own_loss(capsys, place):
    found = run_json(
        capsys, "eval", place / "llama-awq", "--text", place / "texts.txt", "--window", 32
    )["figures"]
    model = AutoModelForCausalLM.from_pretrained(place / "llama-awq")
    tokenizer = AutoTokenizer.from_pretrained(place / "llama-awq")
    ids = tokenizer(
        (place / "texts.txt").read_text(), add_special_tokens=False, return_tensors="pt"
    ).input_ids
    losses = [
        (model(part, labels=part).loss, part.shape[1] - 1)
        for part in ids.split(32, dim=1)
        if part.shape[1] > 1
    ]
    wanted = sum(float(loss) * count for loss, count in losses) / sum(count for _, count in losses)
    assert found["loss"] == pytest.approx(wanted, abs=1e-3)
    low, high = found["interval"]
    assert low < found["perplexity"] < high


def test_a_model_with_a_tower_for_images_continues_texts(capsys, place, tmp_path):
    from conftest import make_tokenizer
    from test_kinds import vision_language

    model = vision_language("llava")
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(tmp_path / "seer")
    make_tokenizer().save_pretrained(tmp_path / "seer")
    options = ["--text", place / "texts.txt", "--window", 16]
    alone = run_json(capsys, "eval", tmp_path / "seer", *options)["figures"]
    beside = run_json(capsys, "eval", tmp_path / "seer", "--base", tmp_path / "seer", *options)
    text = (place / "texts.txt").read_text()
    ids = make_tokenizer()(text, add_special_tokens=False, return_tensors="pt").input_ids
    parts = [part for part in ids.split(16, dim=1) if part.shape[1] > 1]
    with torch.no_grad():
        losses = [float(model(part, labels=part).loss) * (part.shape[1] - 1) for part in parts]
    assert alone["loss"] == pytest.approx(sum(losses) / alone["tokens"], abs=1e-3)
    assert beside["figures"]["mean_kl"] == pytest.approx(0, abs=1e-6)


def test_base_and_quantized_side_by_side(capsys, place):
    common = ["--text", place / "texts.txt", "--window", 32]
    beside = run_json(capsys, "eval", place / "llama-awq", "--base", place / "llama", *common)[
        "figures"
    ]
    alone = [
        run_json(capsys, "eval", place / name, *common)["figures"]
        for name in ("llama", "llama-awq")
    ]
    assert beside["perplexity_before"] == pytest.approx(alone[0]["perplexity"], rel=1e-6)
    assert beside["perplexity_after"] == pytest.approx(alone[1]["perplexity"], rel=1e-6)
    ratio = alone[1]["perplexity"] / alone[0]["perplexity"]
    assert beside["perplexity_ratio"] == pytest.approx(ratio, rel=1e-6)
    low, high = beside["ratio_interval"]
    assert low < ratio < high and beside["mean_kl"] > 0
    itself = run_json(capsys, "eval", place / "llama", "--base", place / "llama", *common)[
        "figures"
    ]
    assert itself["mean_kl"] == 0 and itself["perplexity_ratio"] == 1


def test_embeddings_side_by_side_and_pairs_alone(capsys, place, bert_dir):
    both = run_json(
        capsys, "eval", place / "bert-awq", "--base", bert_dir, "--text", place / "pairs.tsv"
    )["figures"]
    alone = run_json(capsys, "eval", place / "bert-awq", "--text", place / "pairs.tsv")["figures"]
    assert alone == {"pairs": 30, "spearman": pytest.approx(both["spearman_after"], abs=1e-6)}
    texts = run_json(
        capsys, "eval", place / "bert-awq", "--base", bert_dir, "--text", place / "texts.txt"
    )["figures"]
    assert 0.5 < texts["min_cosine"] < texts["mean_cosine"] < 1


def test_texts_of_an_embedding_model_may_stand_one_a_line(capsys, place, bert_dir, texts, tmp_path):
    """As `awq embed --input` and calibration read them; empty lines between them change nothing."""
    common = ["eval", place / "bert-awq", "--base", bert_dir, "--text"]
    found = []
    for name, between in (("lines.txt", "\n"), ("paragraphs.txt", "\n\n")):
        (tmp_path / name).write_text(between.join(texts[:12]))
        found.append(run_json(capsys, *common, tmp_path / name)["figures"])
    assert found[0] == found[1] and found[0]["texts"] == 12
    (tmp_path / "one.txt").write_text(texts[0])
    assert main([*map(str, common), str(tmp_path / "one.txt")]) == 2
    assert "one.txt holds one text; embeddings" in capsys.readouterr().err


def test_eval_gates_end_with_status_1(capsys, place):
    common = ["eval", place / "llama-awq", "--base", place / "llama", "--text", place / "texts.txt"]
    assert run_json(capsys, *common, "--max-kl", 100)["failed_gates"] == []
    failed = run_json(capsys, *common, "--max-kl", 0, "--max-ppl-increase", "-99", status=1)[
        "failed_gates"
    ]
    assert len(failed) == 2 and "mean KL" in failed[0]
    assert main([*map(str, common), "--max-kl", "0"]) == 1
    assert "quality gate failed: mean KL" in capsys.readouterr().err


def test_quantize_gates(capsys, place, tmp_path):
    common = [
        "quantize",
        place / "llama",
        tmp_path / "q",
        "--calib-data",
        place / "texts.txt",
        "--group-size",
        16,
    ]
    report = run_json(capsys, *common, "--evaluate", place / "texts.txt", "--max-kl", 0, status=1)
    assert report["evaluation"]["mean_kl"] > 0
    measured = run_json(
        capsys, "eval", tmp_path / "q", "--base", place / "llama", "--text", place / "texts.txt"
    )["figures"]
    assert report["evaluation"]["mean_kl"] == pytest.approx(measured["mean_kl"], rel=1e-3), (
        "of what was saved"
    )
    assert main(["report", str(tmp_path / "q"), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "perplexity of the original" in page and "memory of the process" in page


def test_each_kind_of_text_has_its_figures(capsys, place, tmp_path):
    """Both verbs take a file for each kind; gates hold for every one, and name it."""
    (tmp_path / "river.txt").write_text("The river is cold and the hills are old. " * 30)
    files = [str(place / "texts.txt"), str(tmp_path / "river.txt")]
    common = ["eval", place / "llama-awq", "--base", place / "llama"]
    alone = [run_json(capsys, *common, "--text", file)["figures"] for file in files]
    gated = [*common, "--text", files[0], "--text", files[1], "--max-kl", 0]
    found = run_json(capsys, *gated, status=1)
    assert found["figures"] == {"texts": dict(zip(files, alone))} and found["text"] == files
    assert [failure.split(": mean")[0] for failure in found["failed_gates"]] == files
    command = ["quantize", place / "llama", tmp_path / "q", "--calib-data", files[0]]
    kinds = ["--group-size", 16, "--evaluate", files[0], "--evaluate", files[1]]
    assert set(run_json(capsys, *command, *kinds)["evaluation"]["texts"]) == set(files)
    card = (tmp_path / "q/README.md").read_text()
    assert all(f"| {Path(file).name}: perplexity | " in card for file in files)
    assert not any(f"{file}: " in card for file in files), "readers have other folders"


def test_an_embedding_model_is_judged_on_one_file(capsys, place):
    twice = ["--text", str(place / "texts.txt")] * 2
    assert main(["eval", str(place / "bert-awq"), "--base", str(place / "bert"), *twice]) == 2
    assert "--text: an embedding model is judged on one file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--max-kl", "1"], "--evaluate"),
        (["--min-cosine", "0.9"], "embedding models"),
        (["--max-kl", "x"], "is no number"),
        (["--evaluate", "no.txt", "--max-kl", "1"], "does not exist"),
    ],
)
def test_gates_that_cannot_be_judged_are_said_before_work(capsys, place, tmp_path, extra, message):
    command = [
        "quantize",
        str(place / "llama"),
        str(tmp_path / "q"),
        "--calib-data",
        str(place / "texts.txt"),
        *extra,
    ]
    try:
        status = main(command)
    except SystemExit as ended:
        status = ended.code
    assert status == 2 and message in capsys.readouterr().err and not (tmp_path / "q").exists()


def test_gates_keep_nothing_for_figures_that_are_no_numbers():
    assert Gates(max_kl=1.0).failures({"mean_kl": float("nan")})
    assert Gates(min_cosine=0.5).failures({"mean_cosine": float("nan")})
    assert not Gates().wanted and Gates(max_kl=0.0).wanted
    with pytest.raises(ConfigError, match="not measured"):
        Gates(max_kl=1.0).failures({"mean_cosine": 1.0})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["eval", "llama"], "nothing to measure"),
        (["eval", "llama", "--text", "no.txt"], "does not exist"),
        (["eval", "llama", "--text", "texts.txt", "--max-kl", "1"], "--base"),
        (["eval", "bert-awq", "--text", "texts.txt"], "--base"),
        (["compare", "llama", "llama-awq"], "not quantized"),
        (["compare", "missing", "llama-awq"], "not a directory"),
        (["chat", "bert-awq"], "chat template"),
        (["eval", "llama", "--tasks", "made-up-task"], "lm-eval"),
    ],
)
def test_errors_are_one_line(capsys, place, monkeypatch, arguments, message):
    monkeypatch.chdir(place)
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_compare_sees_integers_not_their_order(capsys, place, tmp_path):
    assert (
        main(["convert", str(place / "llama-awq"), str(tmp_path / "gemv"), "--version", "GEMV"])
        == 0
    )
    found = run_json(capsys, "compare", place / "llama-awq", tmp_path / "gemv")
    assert (
        found["settings"]["version"] == ["gemm", "gemv"] and found["equal"] == found["shared"] == 21
    )
    assert found["differing_weights"] == {}
    common = [
        "--calib-data",
        place / "texts.txt",
        "--group-size",
        16,
        "--tokens",
        32,
        "--preset",
        "balanced",
    ]
    run_json(capsys, "quantize", place / "llama", tmp_path / "other", *common, "--skip", "layers.0")
    found = run_json(capsys, "compare", place / "llama-awq", tmp_path / "other")
    assert (
        found["shared"] == 14
        and len(found["only_first"]) == 7
        and found["losses"][0] > found["losses"][1]
    )
    assert all(0 < share < 1 for share in found["differing_weights"].values())


def talk(monkeypatch, capsys, place, lines, *options):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    capsys.readouterr()
    status = main(["chat", str(place / "llama-awq"), "--max-new-tokens", "4", *options])
    return status, capsys.readouterr()


def test_chat(monkeypatch, capsys, place, tmp_path):
    lines = [
        "the cat",
        "/undo",
        "a dog runs",
        "/save " + str(tmp_path / "said.json"),
        "/what",
        "/help",
        "/exit",
        "never read",
    ]
    status, said = talk(monkeypatch, capsys, place, lines, "--system", "red fire")
    assert status == 0 and "/what is no command" in said.err and "/retry" in said.err
    messages = json.loads((tmp_path / "said.json").read_text())
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[1]["content"] == "a dog runs"
    model, tokenizer = (
        kind.from_pretrained(place / "llama-awq") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    ids = tokenizer.apply_chat_template(
        messages[:2], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(
        **{k: ids[k] for k in ("input_ids", "attention_mask")}, max_new_tokens=4, do_sample=False
    )
    assert messages[2]["content"] == tokenizer.decode(
        out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True
    )


def test_chat_remembers_and_forgets_what_no_longer_fits(monkeypatch, capsys, place):
    status, said = talk(monkeypatch, capsys, place, ["the cat", "a dog", "/retry"], "--json")
    messages = json.loads(said.out)["messages"]
    assert status == 0 and [m["content"] for m in messages if m["role"] == "user"] == [
        "the cat",
        "a dog",
    ]
    long = " ".join(["stone"] * 12)
    status, said = talk(
        monkeypatch, capsys, place, [long, long, long], "--json", "--max-seq-len", "40"
    )
    kept = [m for m in json.loads(said.out)["messages"] if m["role"] == "user"]
    assert status == 0 and 1 <= len(kept) < 3 and "oldest turn" in said.err
    status, said = talk(
        monkeypatch, capsys, place, [" ".join(["stone"] * 60)], "--max-seq-len", "40"
    )
    assert status == 2 and "raise --max-seq-len" in said.err


def test_env_names_versions_and_kernels(capsys):
    found = run_json(capsys, "env")
    assert found["torch"] == torch.__version__ and found["kernels"]["cpu"]["reference"] == "yes"
    assert main(["env"]) == 0 and "kernel reference on cpu: yes" in capsys.readouterr().out


def test_completion_knows_every_verb(capsys):
    pytest.importorskip("shtab", reason="shtab is not installed")
    from awq.cli import VERBS

    script = run_json(capsys, "completion", "bash")["script"]
    assert all(verb in script for verb in VERBS) and "--max-kl" in script


def test_embeddings_in_three_kinds_of_files(capsys, place, tmp_path, monkeypatch):
    from pyarrow import parquet

    texts = ["the cat", "a dog runs"]
    wanted = torch.tensor(run_json(capsys, "embed", place / "bert-awq", *texts)["embeddings"])
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(texts)))
    assert (
        main(
            [
                "embed",
                str(place / "bert-awq"),
                "--input",
                "-",
                "--output",
                str(tmp_path / "v.parquet"),
            ]
        )
        == 0
    )
    for suffix in (".npy", ".jsonl"):
        assert (
            main(
                ["embed", str(place / "bert-awq"), *texts, "--output", str(tmp_path / f"v{suffix}")]
            )
            == 0
        )
    table = parquet.read_table(tmp_path / "v.parquet")
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert table["text"].to_pylist() == [row["text"] for row in rows] == texts
    for found in (
        table["embedding"].to_pylist(),
        [row["embedding"] for row in rows],
        numpy.load(tmp_path / "v.npy"),
    ):
        torch.testing.assert_close(
            torch.as_tensor(numpy.asarray(found, dtype="float32")), wanted, atol=1e-5, rtol=1e-4
        )
    assert main(["embed", str(place / "bert-awq"), *texts, "--output", "v.bin"]) == 2


def test_tasks_run_through_lm_eval_on_a_local_file(capsys, place, tmp_path):
    """Its log-likelihoods are the model's own, base beside quantized, without a network."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    (tmp_path / "data.jsonl").write_text(
        "\n".join(
            json.dumps({"q": f"the {a}", "c": [" cat", " dog"], "a": i % 2})
            for i, a in enumerate(["old", "new", "red", "blue"])
        )
    )
    (tmp_path / "task.yaml").write_text(
        "task: local_words\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tmp_path / 'data.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: "
        "c\ndoc_to_target: a\n"
        "metric_list:\n  - metric: acc\n"
    )
    found = run_json(
        capsys,
        "eval",
        place / "llama-awq",
        "--base",
        place / "llama",
        "--tasks",
        "local_words",
        "--include-path",
        tmp_path,
    )["tasks"]
    assert found.keys() == {"base", "model"} and 0 <= found["model"]["local_words"]["acc"] <= 1
