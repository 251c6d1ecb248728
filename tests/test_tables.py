"""Tables of launch configurations: the user's before the shipped ones, reading, writing, and `awq
tune`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from awq.cli import main
from awq.kernels import Shape
from awq.kernels.triton import configs

ENTRY = [16, 64, 2, False, 4, 3]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of user tables, which is the one in use."""
    monkeypatch.setenv(configs.VARIABLE, str(tmp_path))
    forget()
    yield tmp_path
    forget()


def forget():
    configs.table.cache_clear()
    configs._users.cache_clear()
    configs.expert_table.cache_clear()


def write(folder, architecture, **parts):
    (folder / f"{architecture}.json").write_text(json.dumps({"measured_on": "a GPU"} | parts))
    forget()


def test_the_users_entries_come_first(folder):
    shape = Shape(4096, 4096, 128)
    shipped = configs.config_for("sm90", 132, shape, 16), configs.config_for("sm90", 132, shape, 8)
    write(folder, "sm90", shapes={"4096x4096": {"16": ENTRY}})
    assert configs.config_for("sm90", 132, shape, 16) == configs.Config(*ENTRY) != shipped[0]
    assert configs.config_for("sm90", 132, shape, 8) == shipped[1]
    assert configs.config_for("sm90", 132, shape, 16, torch.bfloat16) == configs.Config(*ENTRY)


def test_bfloat16_may_differ(folder):
    write(folder, "sm120", shapes={"72x128": {"8": ENTRY}}, bfloat16={"72x128": {"8": None}})
    assert configs.config_for("sm120", 100, Shape(128, 72, 128), 5) == configs.Config(*ENTRY)
    assert configs.config_for("sm120", 100, Shape(128, 72, 128), 5, torch.bfloat16) is None


def test_few_entries_do_not_serve_other_numbers_of_tokens(folder):
    shape = Shape(256, 72, 128)
    write(folder, "sm120", shapes={"72x256": {"64": ENTRY, "24": ENTRY}})
    for tokens in (1, 8, 25, 32, 65, 128):
        assert configs.config_for("sm120", 100, shape, tokens) == configs.rule(
            "sm120", 100, shape, tokens
        )
    for tokens in (17, 24, 33, 64):
        assert configs.config_for("sm120", 100, shape, tokens) == configs.Config(*ENTRY)


BROKEN = [
    "",
    "[1]",
    "[" * 100_000,
    '{"shapes": {"72x256": [1]}}',
    '{"shapes": {"72x256": {"8": [1, 2]}}}',
    '{"shapes": {"72x256": {"8": [16, 64, 0, false, 4, 3]}}}',
    '{"shapes": {"72x256": {"8": [1000000000, 64, 1, false, 4, 3]}}}',
    '{"shapes": {"72x256": {"8": [24, 64, 1, false, 4, 3]}}}',
    '{"shapes": {"72x256": {"8": [16, 64, 1, 7, 4, 3]}}}',
    '{"shapes": {"1x1": {"x": null}}}',
]


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_table_is_one_warning(folder, text, caplog):
    """An optional file never stops inference: the shipped table and the rule serve, and the user
    hears of it once."""
    shape = Shape(4096, 4096, 128)
    dtypes = (torch.float16, torch.bfloat16)
    shipped = [configs.config_for("sm90", 132, shape, 16, dtype) for dtype in dtypes]
    forget()
    (folder / "sm90.json").write_text(text)
    assert [configs.config_for("sm90", 132, shape, 16, dtype) for dtype in dtypes] == shipped
    assert [record.levelname for record in caplog.records] == [
        "WARNING"
    ] and "sm90.json" in caplog.text


def test_a_user_without_a_home(monkeypatch, caplog):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    for variable in (configs.VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    forget()
    assert configs.config_for("sm120", 100, Shape(256, 72, 128), 8) == configs.rule(
        "sm120", 100, Shape(256, 72, 128), 8
    )
    assert "set AWQ_KERNEL_TABLES" in caplog.text
    forget()


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(configs.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert configs.user_tables() == tmp_path / "awq" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert configs.user_tables() == Path.home() / ".cache" / "awq" / "kernels"


def test_written_tables_are_read_and_added_to(folder):
    from awq.kernels.triton import tuning

    half, brain, config = torch.float16, torch.bfloat16, configs.Config(*ENTRY)
    one, two = Shape(256, 72, 128), Shape(512, 72, 128)
    path = folder / "deeper" / "sm120.json"
    tuning.write_table(
        path, "a GPU", {(one, half, 16): [tuning.Timing(1.0, config), tuning.Timing(2.0, None)]}
    )
    tuning.write_table(
        path,
        "a GPU",
        {(one, half, 8): [tuning.Timing(1.0, None)], (two, brain, 8): [tuning.Timing(1.0, config)]},
    )
    assert json.loads(path.read_text())["shapes"]["72x256"] == {"8": None, "16": ENTRY}
    path.rename(folder / "sm120.json")
    configs.table.cache_clear()
    assert configs.table("sm120") == {"72x256": {8: None, 16: config}}
    assert configs.table("sm120", brain) == {"72x256": {8: None, 16: config}, "72x512": {8: config}}


def test_candidates_can_be_launched():
    from awq.kernels.triton import tuning

    for n, k in ((4096, 4096), (28672, 4096), (72, 4224), (8, 128)):
        for tokens in configs.BUCKETS:
            found = tuning.candidates(Shape(k, n, 128), tokens, 132)
            assert len(found) == len(set(found)) < 64 and all(
                c.bm >= 8 and c.split <= max(1, -(-k // 128)) for c in found
            )
            assert found or n * k < 4096 * 4096


def test_tune_says_what_is_wrong(capsys, monkeypatch):
    def message(*arguments):
        assert main(["tune", *arguments]) == 2
        return capsys.readouterr().err

    assert "--shapes" in message()
    assert "4096by4096" in message("--shapes", "4096by4096") and "0x5" in message("--shapes", "0x5")
    if not torch.cuda.is_available():
        assert "there is none" in message("--shapes", "4096x4096")


def test_tune_writes_the_users_table(capsys, monkeypatch, folder):
    """The command around a search that is made up: there is no GPU."""
    from awq.kernels import triton
    from awq.kernels.triton import launcher, tuning

    asked = {}

    def search(shapes, tokens, seconds, workers, say):
        asked.update(shapes=shapes, tokens=tokens)
        served = configs.config_for("sm120", 100, shapes[0], 16, torch.bfloat16)
        times = [tuning.Timing(1.234, configs.Config(*ENTRY)), tuning.Timing(2.468, served)]
        return {(shapes[0], torch.bfloat16, 16): times}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(triton, "why_not", lambda device, dtype, shape: None)
    monkeypatch.setattr(launcher, "architecture", lambda index: ("sm120", 100))
    monkeypatch.setattr(tuning, "tune", search)
    assert (
        main(["tune", "--shapes", "72x256", "--tokens", "16", "--dtypes", "bfloat16", "--json"])
        == 0
    )
    assert asked == {"shapes": [Shape(256, 72, 128)], "tokens": {torch.bfloat16: [16]}}
    result = json.loads(capsys.readouterr().out)
    assert result["best"] == [
        {
            "shape": "72x256",
            "dtype": "bfloat16",
            "tokens": 16,
            "us": 1.23,
            "config": ENTRY,
            "times_as_fast": 2.0,
        }
    ]
    forget()  # as the next process
    assert configs.config_for(
        "sm120", 100, Shape(256, 72, 128), 9, torch.bfloat16
    ) == configs.Config(*ENTRY)


def test_gain_over_what_served_before():
    from awq.kernels.triton.tuning import Timing, gain

    best, other = configs.Config(*ENTRY), configs.Config(8, 64, 1, False, 2, 4)
    timings = [Timing(2.0, best), Timing(3.0, other), Timing(5.0, None)]
    assert gain(timings, best) == 1.0
    assert gain(timings, other) == 1.5
    assert gain(timings, None) == 2.5
    assert gain(timings[:1], other) is None


def test_tune_finds_the_linears_of_a_model(tmp_path, llama_dir, texts):
    from awq.cli.tune import _of_model

    (tmp_path / "texts.txt").write_text("\n".join(texts))
    main(
        [
            "quantize",
            str(llama_dir),
            str(tmp_path / "q"),
            "--calib-data",
            str(tmp_path / "texts.txt"),
            "--group-size",
            "16",
            "--tokens",
            "32",
            "--preset",
            "fast",
        ]
    )
    found = _of_model(str(tmp_path / "q"))
    assert all(shape.group_size == 16 for shape in found)
    assert any(shape.out_features > shape.in_features for shape in found)


def test_tables_need_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None; from awq.kernels.triton import configs; "
        "print(len(configs.table('sm90')))"
    )
    assert (
        int(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout
        )
        > 0
    )


def test_stacks_of_experts_have_a_section_of_their_own(folder):
    shape = Shape(256, 72, 128)
    write(folder, "sm120", experts={"8x72x256": {"2": ENTRY, "16": ENTRY}})
    for pairs in (1, 2, 8, 16):
        config = configs.config_for_experts("sm120", 100, shape, pairs, 8)
        assert config == configs.Config(*ENTRY), pairs
    for pairs, experts in ((3, 8), (7, 8), (17, 8), (2, 9)):
        config = configs.config_for_experts("sm120", 100, shape, pairs, experts)
        assert config == configs.rule_for_experts("sm120", 100, shape, pairs, experts)
