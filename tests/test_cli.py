"""The command `awq`: every verb on tiny models on disk, for people and with --json, and its errors."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import zoo
from transformers import AutoModel

from awq import AutoAWQForCausalLM
from awq.cli import VERBS, main


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
        status = main([
            "quantize", str(source), str(made[name]), "--calib-data", str(root / "texts.jsonl"), "--text-column", "body",
            "--group-size", "16", "--tokens", "32",
        ])  # fmt: skip
        assert status == 0
    return made


def test_quantize_with_json_and_options(capsys, bert_dir, texts, tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(texts))
    report = run_json(capsys, "quantize", bert_dir, tmp_path / "q", "--calib-data", tmp_path / "t.txt", "--group-size", 16,
                      "--version", "gemv", "--preset", "fast", "--samples", 8, "--skip", "layer.2")  # fmt: skip
    assert len(report["linears"]) == 12 and report["loss"] <= report["loss_rtn"] and report["output"] == str(tmp_path / "q")
    info = run_json(capsys, "info", tmp_path / "q")
    assert info["version"] == "gemv" and info["quantized_linears"] == 12


def test_quantized_for_people(capsys, llama_dir, texts, tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(texts))
    capsys.readouterr()
    assert (
        main(["quantize", str(llama_dir), str(tmp_path / "q"), "--calib-data", str(tmp_path / "t.txt"), "--group-size", "16"]) == 0
    )
    out = capsys.readouterr().out
    assert "21 linears quantized" in out and f"saved to {tmp_path / 'q'}" in out


def test_info(capsys, quantized):
    info = run_json(capsys, "info", quantized["llama"])
    assert (info["w_bit"], info["q_group_size"], info["version"], info["zero_point"]) == (4, 16, "gemm", True)
    assert info["quantized_linears"] == 21 and info["modules_to_not_convert"] == ["lm_head"] and info["weight_bytes"] > 0
    assert main(["info", str(quantized["llama"])]) == 0
    assert "q_group_size: 16" in capsys.readouterr().out


def test_generate(capsys, quantized):
    result = run_json(capsys, "generate", quantized["llama"], "the cat runs", "--max-new-tokens", 5)
    assert result["prompt"] == "the cat runs" and 1 <= result["new_tokens"] <= 5
    assert main(["generate", str(quantized["llama"]), "the cat", "--max-new-tokens", "3"]) == 0


def test_embed(capsys, quantized, texts):
    result = run_json(capsys, "embed", quantized["bert"], *texts[:3])
    vectors = torch.tensor(result["embeddings"])
    assert vectors.shape == (3, 32)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(torch.tensor(result["cosine"]), vectors @ vectors.t())
    assert main(["embed", str(quantized["bert"]), "the cat", "a dog"]) == 0
    assert capsys.readouterr().out.count("\n") == 2


def test_embedding_models_go_through_their_own_door(capsys, bert_dir, texts, tmp_path):
    """Texts with prompts, count by the model's size, figures before and after: what AutoAWQForEmbedding gives."""
    from test_encoder import sentence_directory

    from awq import AutoAWQForEmbedding

    model = sentence_directory(bert_dir, tmp_path / "m", ("cls",), dense=True, config={"prompts": {"query": "the old house "}})
    (tmp_path / "t.txt").write_text("\n\n".join(texts))
    (tmp_path / "p.tsv").write_text("".join(f"{i % 6}\t{a}\t{b}\n" for i, (a, b) in enumerate(zip(texts, texts[30:]))))
    common = ["quantize", model, tmp_path / "q", "--calib-data", tmp_path / "t.txt", "--group-size", 16, "--prompt-name", "query"]
    report = run_json(capsys, *common, "--samples", 20)
    direct = AutoAWQForEmbedding.from_pretrained(str(model))
    options = dict(quant_config={"q_group_size": 16}, prompt_name="query", max_calib_samples=20)
    assert report["evaluation"] == direct.quantize(texts=texts, **options).evaluation.to_dict()
    embedded = run_json(capsys, "embed", tmp_path / "q", *texts[:2], "--prompt-name", "query")
    mine = direct.encode(texts[:2], prompt_name="query", normalize=True)
    torch.testing.assert_close(torch.tensor(embedded["embeddings"]), mine, atol=1e-5, rtol=1e-4)
    on_pairs = run_json(capsys, *common, "--evaluate", tmp_path / "p.tsv")["evaluation"]
    assert on_pairs["texts"] == 60 and on_pairs["spearman_after"] is not None and on_pairs["ndcg_after"] is not None
    assert main([*map(str, common), "--evaluate", str(tmp_path / "t.txt")]) == 0
    assert "cosine to full precision on 60 texts" in capsys.readouterr().out
    (tmp_path / "bad.tsv").write_text("no score\ta\tb\n")
    for file, message in (("no.tsv", "does not exist"), ("bad.tsv", "score")):
        assert main([*map(str, common), "--evaluate", str(tmp_path / file)]) == 1
        assert message in capsys.readouterr().err
    assert main(["quantize", str(bert_dir), str(tmp_path / "x"), "--prompt-name", "query"]) == 1
    assert "--prompt-name" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_no_tokenizer_is_said_before_calibration(capsys, bert_dir, tmp_path):
    """transformers 5 makes an empty one up; every word would be unknown."""
    shutil.copytree(bert_dir, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    assert main(["quantize", str(tmp_path / "m"), str(tmp_path / "q"), "--group-size", "16"]) == 1
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


@pytest.mark.parametrize("arguments", [
    ["info", "MISSING"], ["quantize", "MISSING", "OUT"], ["generate", "MISSING", "hello"], ["embed", "MISSING", "hello"],
    ["convert", "MISSING", "OUT", "--version", "gemv"], ["folds", "MISSING"],
])  # fmt: skip
def test_missing_model_is_one_line_and_status_1(capsys, tmp_path, arguments):
    paths = {"MISSING": str(tmp_path / "nothing"), "OUT": str(tmp_path / "out")}
    capsys.readouterr()
    assert main([paths.get(a, a) for a in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert captured.err.splitlines()[-1].startswith(f"awq {arguments[0]}: ") and "nothing" in captured.err
    assert not (tmp_path / "out").exists()


def test_wrong_settings_are_status_1(capsys, llama_dir, quantized, tmp_path):
    assert main(["quantize", str(llama_dir), str(tmp_path / "out"), "--version", "marlin"]) == 1
    assert "marlin" in capsys.readouterr().err
    assert main(["convert", str(quantized["bert"]), str(tmp_path / "out"), "--version", "marlin"]) == 1
    assert main(["generate", str(quantized["bert"]), "hello"]) == 1
    assert not (tmp_path / "out").exists()


def test_help_is_light():
    code = "import sys; from awq.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)
