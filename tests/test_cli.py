"""The command `awq`: every verb on tiny models on disk, for people and with --json, and its
errors."""

import json
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import awq
from awq import AutoAWQForCausalLM
from awq.cli import VERBS, main
from awq.cli.output import whole_file
from awq.config import AwqConfig
from awq.errors import ConfigError


def run_json(capsys, *arguments):
    """A verb's result; stdout must be one JSON document and nothing else."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def quantized(llama_dir, bert_dir, texts, tmp_path_factory):
    """{"llama": directory, "bert": directory}, made by `awq quantize` from a text file."""
    root = tmp_path_factory.mktemp("cli")
    (root / "texts.jsonl").write_text("\n".join(json.dumps({"body": t}) for t in texts))
    made = {}
    for name, source in (("llama", llama_dir), ("bert", bert_dir)):
        made[name] = root / f"{name}-awq"
        status = main(
            [
                "quantize",
                str(source),
                str(made[name]),
                "--calib-data",
                str(root / "texts.jsonl"),
                "--text-column",
                "body",
                "--group-size",
                "16",
                "--tokens",
                "32",
            ]
        )
        assert status == 0
    return made


def test_quantize_with_json_and_options(capsys, bert_dir, texts, tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(texts))
    report = run_json(
        capsys,
        "quantize",
        bert_dir,
        tmp_path / "q",
        "--calib-data",
        tmp_path / "t.txt",
        "--group-size",
        16,
        "--version",
        "gemv",
        "--preset",
        "fast",
        "--samples",
        8,
        "--skip",
        "layer.2",
    )
    assert (
        len(report["linears"]) == 12
        and report["loss"] <= report["loss_rtn"]
        and report["output"] == str(tmp_path / "q")
    )
    info = run_json(capsys, "info", tmp_path / "q")
    assert info["version"] == "gemv" and info["quantized_linears"] == 12


def test_quantized_for_people(capsys, llama_dir, texts, tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(texts))
    capsys.readouterr()
    assert (
        main(
            [
                "quantize",
                str(llama_dir),
                str(tmp_path / "q"),
                "--calib-data",
                str(tmp_path / "t.txt"),
                "--group-size",
                "16",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "21 linears quantized" in out and f"saved to {tmp_path / 'q'}" in out


def test_info(capsys, quantized):
    info = run_json(capsys, "info", quantized["llama"])
    assert (info["w_bit"], info["q_group_size"], info["version"], info["zero_point"]) == (
        4,
        16,
        "gemm",
        True,
    )
    assert (
        info["quantized_linears"] == 21
        and info["modules_to_not_convert"] == ["lm_head"]
        and info["weight_bytes"] > 0
    )
    assert main(["info", str(quantized["llama"])]) == 0
    out = capsys.readouterr().out
    assert (
        "group size: 16" in out
        and "not quantized: lm_head" in out
        and "llama (LlamaForCausalLM)" in out
    )


def test_info_says_what_loads_a_directory(capsys, quantized, tmp_path):
    info = run_json(capsys, "info", quantized["llama"])
    assert info["loaded_by"][:2] == ["this package", "transformers after `import awq`"]
    assert "vLLM" not in info["loaded_by"]  # which has no kernel for groups of 16
    command = ["convert", quantized["llama"], tmp_path / "other", "--version", "compressed-tensors"]
    run_json(capsys, *command)
    other = run_json(capsys, "info", tmp_path / "other")
    assert other["loaded_by"][0] == "this package after `awq convert`"
    assert (other["version"], other["quantized_linears"]) == ("compressed-tensors", 21)


def test_info_refuses_a_linear_that_lacks_a_tensor(capsys, quantized, tmp_path):
    shutil.copytree(quantized["llama"], tmp_path / "broken")
    [file] = (tmp_path / "broken").glob("*.safetensors")
    tensors = load_file(file)
    lost = next(name for name in tensors if name.endswith(".qzeros"))
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    assert main(["info", str(tmp_path / "broken")]) == 2
    assert f"{lost.removesuffix('.qzeros')}: the checkpoint lacks qzeros" in capsys.readouterr().err


def test_generate(capsys, quantized):
    result = run_json(capsys, "generate", quantized["llama"], "the cat runs", "--max-new-tokens", 5)
    assert result["prompt"] == "the cat runs" and 1 <= result["new_tokens"] <= 5
    assert main(["generate", str(quantized["llama"]), "the cat", "--max-new-tokens", "3"]) == 0


def test_a_model_that_ends_at_once_says_so(caplog, quantized, monkeypatch):
    """As one does that was trained on chats and gets a bare prompt."""
    silent = lambda _self, input_ids, **_: input_ids  # noqa: E731
    monkeypatch.setattr("awq.models.generation.FusedGeneration.generate", silent)
    assert main(["generate", str(quantized["llama"]), "the cat", "--json"]) == 0
    assert "--chat" in caplog.text


def test_embed(capsys, quantized, texts):
    result = run_json(capsys, "embed", quantized["bert"], *texts[:3])
    vectors = torch.tensor(result["embeddings"])
    assert vectors.shape == (3, 32)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(torch.tensor(result["cosine"]), vectors @ vectors.t())
    assert main(["embed", str(quantized["bert"]), "the cat", "a dog"]) == 0
    assert capsys.readouterr().out.count("\n") == 3


def test_embedding_models_go_through_their_own_door(capsys, bert_dir, texts, tmp_path):
    """Texts with prompts, count by the model's size, figures before and after: what
    AutoAWQForEmbedding gives."""
    from test_encoder import sentence_directory

    from awq import AutoAWQForEmbedding

    model = sentence_directory(
        bert_dir,
        tmp_path / "m",
        ("cls",),
        dense=True,
        config={"prompts": {"query": "the old house "}},
    )
    (tmp_path / "t.txt").write_text("\n\n".join(texts))
    (tmp_path / "p.tsv").write_text(
        "".join(f"{i % 6}\t{a}\t{b}\n" for i, (a, b) in enumerate(zip(texts, texts[30:])))
    )
    common = [
        "quantize",
        model,
        tmp_path / "q",
        "--calib-data",
        tmp_path / "t.txt",
        "--group-size",
        16,
        "--prompt-name",
        "query",
    ]
    report = run_json(capsys, *common, "--samples", 20)
    direct = AutoAWQForEmbedding.from_pretrained(str(model))
    options = dict(quant_config={"q_group_size": 16}, prompt_name="query", max_calib_samples=20)
    assert report["evaluation"] == direct.quantize(texts=texts, **options).evaluation.to_dict()
    embedded = run_json(capsys, "embed", tmp_path / "q", *texts[:2], "--prompt-name", "query")
    mine = direct.encode(texts[:2], prompt_name="query", normalize=True)
    torch.testing.assert_close(torch.tensor(embedded["embeddings"]), mine, atol=1e-5, rtol=1e-4)
    on_pairs = run_json(capsys, *common, "--evaluate", tmp_path / "p.tsv")["evaluation"]
    assert (
        on_pairs["texts"] == 60
        and on_pairs["spearman_after"] is not None
        and on_pairs["ndcg_after"] is not None
    )
    assert main([*map(str, common), "--evaluate", str(tmp_path / "t.txt")]) == 0
    assert "cosine to full precision on 60 texts" in capsys.readouterr().out
    (tmp_path / "bad.tsv").write_text("no score\ta\tb\n")
    for file, message in (("no.tsv", "does not exist"), ("bad.tsv", "score")):
        assert main([*map(str, common), "--evaluate", str(tmp_path / file)]) == 2
        assert message in capsys.readouterr().err
    assert main(["quantize", str(bert_dir), str(tmp_path / "x"), "--prompt-name", "query"]) == 2
    assert "--prompt-name" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_no_tokenizer_is_said_before_calibration(capsys, bert_dir, tmp_path):
    """transformers 5 makes an empty one up; every word would be unknown."""
    shutil.copytree(
        bert_dir, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer*", "special*")
    )
    assert main(["quantize", str(tmp_path / "m"), str(tmp_path / "q"), "--group-size", "16"]) == 2
    assert "tokenizer" in capsys.readouterr().err
    model = AutoAWQForCausalLM.from_pretrained(str(tmp_path / "m"))
    assert model.tokenizer is None


def test_convert(capsys, quantized, tmp_path):
    result = run_json(capsys, "convert", quantized["bert"], tmp_path / "v", "--version", "GEMV")
    assert result["converted"] == 18
    assert run_json(capsys, "info", tmp_path / "v")["version"] == "gemv"
    inputs = zoo.token_batch()
    first, second = (AutoModel.from_pretrained(d) for d in (quantized["bert"], tmp_path / "v"))
    assert torch.equal(zoo.outputs(first, **inputs), zoo.outputs(second, **inputs))


def test_folds(capsys, llama_dir, bert_dir):
    groups = run_json(capsys, "folds", llama_dir)["groups"]
    found = {tuple(g["linears"]): g["fold"] for g in groups}
    assert found[("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")] == "input_layernorm"
    assert found[("mlp.down_proj",)] == "mlp.up_proj (48 rows)"
    assert all(len(g["blocks"]) == 3 for g in groups)
    found = {tuple(g["linears"]): g for g in run_json(capsys, "folds", bert_dir)["groups"]}
    assert found[("attention.output.dense",)]["fold"].startswith("attention.self.value")
    assert found[("output.dense",)]["fold"] is None and found[("output.dense",)]["reason"]
    assert main(["folds", str(llama_dir)]) == 0
    assert "model.layers.0 … model.layers.2 (3)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "MISSING"],
        ["quantize", "MISSING", "OUT"],
        ["generate", "MISSING", "hello"],
        ["embed", "MISSING", "hello"],
        ["convert", "MISSING", "OUT", "--version", "gemv"],
        ["folds", "MISSING"],
    ],
)
def test_missing_model_is_one_line_and_status_2(capsys, tmp_path, arguments):
    paths = {"MISSING": str(tmp_path / "nothing"), "OUT": str(tmp_path / "out")}
    capsys.readouterr()
    assert main([paths.get(a, a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert (
        captured.err.splitlines()[-1].startswith(f"awq {arguments[0]}: ")
        and "nothing" in captured.err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["quantize", "m", "o", "--version", "marlin"], "GEMV"),
        (["quantize", "m", "o", "--preset", "turbo"], "balanced"),
        (["quantize", "m", "o", "--samples", "0"], "at least 1"),
        (["quantize", "m", "o", "--tokens", "0"], "at least 1"),
        (["quantize", "m", "o", "--group-size", "3"], "whole row"),
        (["quantize", "m", "o", "--dtype", "int8"], "bfloat16"),
        (["convert", "m", "o", "--version", "marlin"], "GEMV"),
        (["generate", "m", "p", "--max-new-tokens", "0"], "at least 1"),
        (["bench", "m", "--repeats", "x"], "at least 1"),
    ],
)
def test_bad_values_are_refused_while_the_command_line_is_read(capsys, arguments, word):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and word in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["quantise", "m", "o"], "awq: no verb 'quantise'; did you mean quantize?"),
        (["serve", "m"], "awq: no verb 'serve'"),
        (
            ["quantize", "m", "o", "--sampels=8"],
            "awq quantize: no option '--sampels'; did you mean --samples?",
        ),
        (
            ["quantize", "m", "o", "--max-calib-seq-len", "64"],
            "awq quantize: no option '--max-calib-seq-len'; did you mean --tokens?",
        ),
        (
            ["quantize", "m", "o", "--max-seq-len=64"],
            "awq quantize: no option '--max-seq-len'; did you mean --tokens?",
        ),
        (["info", "m", "--xyz"], "awq info: no option '--xyz'"),
        (["env", "more"], "awq env: no place for 'more'"),
        (["generate", "m"], "awq generate: the following arguments are required: prompt"),
    ],
)
def test_a_mistake_in_the_command_line_is_one_line(capsys, arguments, line):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    (told,) = capsys.readouterr().err.splitlines()
    verb = line.partition(":")[0]
    assert ended.value.code == 2 and told == f"{line} (`{verb} --help` shows what there is)"


def test_choices_are_those_of_the_python_interface():
    from awq.cli.arguments import PRESETS, VERSIONS, version
    from awq.config import FORMATS, normalize_format
    from awq.quantize.options import PRESETS as options

    assert set(PRESETS) == set(options) and {normalize_format(name) for name in VERSIONS} == set(
        FORMATS
    )
    assert all(version(name) in VERSIONS for name in FORMATS)


def failed(capsys, *arguments):
    """stderr of a verb that fails: one line, and nothing on stdout."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    line = captured.err.splitlines()[-1]
    assert line.startswith(f"awq {arguments[0]}: ")
    return line


@pytest.mark.parametrize("device", ["cuda:99", "tpu9", "cuda:x"])
def test_a_device_that_is_not_there_is_one_line(
    capsys, quantized, llama_dir, texts, tmp_path, device
):
    (tmp_path / "t.txt").write_text("\n\n".join(texts))
    assert device in failed(capsys, "embed", quantized["bert"], "a", "--device", device)
    assert device in failed(capsys, "generate", quantized["llama"], "hi", "--device", device)
    arguments = ["--calib-data", tmp_path / "t.txt", "--group-size", 16, "--device", device]
    assert device in failed(capsys, "quantize", llama_dir, tmp_path / "q", *arguments)
    assert not (tmp_path / "q").exists()


def test_errors_of_other_packages_are_one_line_too(capsys, quantized, tmp_path):
    broken = tmp_path / "m"
    shutil.copytree(quantized["llama"], broken)
    (broken / "tokenizer.json").write_text("{")
    line = failed(capsys, "generate", broken, "hi")
    assert len(line) < 500
    with pytest.raises(Exception, match="."):
        main(["generate", str(broken), "hi", "--debug"])


def test_encoders_do_not_generate(capsys, quantized):
    assert "language model" in failed(capsys, "generate", quantized["bert"], "hello")


def test_the_group_size_is_judged_before_any_text_is_looked_for(
    capsys, llama_dir, bert_dir, tmp_path
):
    """A wrong size needs no hub, no file and no tokenizer to be told; the hint names every size
    that fits."""
    for source in (llama_dir, bert_dir):
        line = failed(
            capsys,
            "quantize",
            source,
            tmp_path / "q",
            "--group-size",
            24,
            "--calib-data",
            "nobody/nothing",
        )
        assert (
            "--skip" in line
            and "--group-size 24" in line
            and "16" in line
            and "nothing" not in line
        )
    with pytest.raises(ConfigError, match="128 or 64 or 32 or 16"):
        AwqConfig(group_size=100).group_size_of(384)


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch, caplog):
    """The address is one where nothing listens; `datasets` would go on for half a minute."""
    from huggingface_hub import constants

    from awq.calibration import sources

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.perf_counter()
    assert sources._hub_samples("pileval", "train", "text", 8) is None
    assert time.perf_counter() - start < 10 and "bundled text" in caplog.text


def test_embeddings_from_a_file_to_a_file(capsys, quantized, texts, tmp_path):
    import numpy

    (tmp_path / "t.txt").write_text("\n".join(texts[:5]) + "\n\n")
    common = ["embed", quantized["bert"], "--input", tmp_path / "t.txt", "--output"]
    assert run_json(capsys, *common, tmp_path / "e.npy")["texts"] == 5
    assert main([*map(str, common), str(tmp_path / "e.jsonl")]) == 0
    matrix = numpy.load(tmp_path / "e.npy")
    rows = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == texts[:5]
    numpy.testing.assert_allclose(matrix, [row["embedding"] for row in rows], atol=1e-6)
    assert ".npy" in failed(capsys, *common, tmp_path / "e.txt")
    assert "no texts" in failed(capsys, "embed", quantized["bert"])
    capsys.readouterr()
    assert main(["embed", str(quantized["bert"]), "one text"]) == 0
    assert "32 features" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_told_before_any_work(capsys, quantized, tmp_path):
    """No model is loaded: there is none of that name."""
    for place, words in (("no/e.npy", f"there is no directory {tmp_path}/no"), ("", "a directory")):
        told = failed(capsys, "embed", "nothing", "a", "--output", f"{tmp_path}/{place}")
        assert words in told
        told = failed(capsys, "report", quantized["llama"], "--html", f"{tmp_path}/{place}")
        assert words in told


def test_a_file_appears_when_all_of_it_is_written(tmp_path):
    (tmp_path / "e.npy").write_text("before")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "e.npy") as work:
        work.write_text("half")
        raise KeyboardInterrupt
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
    with whole_file(tmp_path / "e.npy") as work:
        work.write_text("whole")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


def test_signs_of_life_where_stderr_is_no_terminal(capsys, llama_dir, texts, tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(texts))
    common = [
        "quantize",
        str(llama_dir),
        str(tmp_path / "q"),
        "--calib-data",
        str(tmp_path / "t.txt"),
        "--group-size",
        "16",
        "--preset",
        "fast",
    ]
    assert main(common) == 0
    err = capsys.readouterr().err
    assert (
        err.index("loading")
        < err.index("quantizing: preset fast")
        < err.index("block 1 of 3 done")
        < err.index("saving to")
    )
    assert re.findall(r"block 3 of 3 done, loss \d\.\d+, 0:00:\d\d so far, about 0:00:00 left", err)
    assert main([*common, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_tuning_without_a_gpu_loads_no_model(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("needs Linux without a GPU")
    assert "there is none" in failed(capsys, "tune", tmp_path / "nothing")


def test_no_verb_and_version(capsys):
    assert main([]) == 2
    assert "quantize" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and f"awq {awq.__version__}, torch" in capsys.readouterr().out


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for default in ("128", "balanced", "GEMM", "auto", "512", "text", "train", "pileval"):
        assert f"(default: {default})" in text, default


def test_every_verb_is_told_in_whole_sentences():
    from awq.cli import make_parser

    (verbs,) = [action for action in make_parser()._actions if action.dest == "verb"]
    told = {choice.dest: choice.help for choice in verbs._choices_actions}
    assert told and not [name for name, text in told.items() if not text.endswith((".", "`."))]


def test_a_pipe_that_closes_is_one_line(quantized):
    code = (
        "import sys; from awq.cli import main; sys.exit(main(['info', "
        f"{str(quantized['llama'])!r}]))"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run.stdout.close()
    err = run.stderr.read()
    assert run.wait() == 2 and "Traceback" not in err and "closed" in err


def test_info_loads_no_torch(quantized):
    code = (
        f"import sys; from awq.cli import main; main(['info', {str(quantized['llama'])!r}]); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_is_light():
    code = (
        "import sys; from awq.cli import main\ntry: main(['--help'])\nexcept SystemExit: "
        "pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)
