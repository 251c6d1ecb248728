"""The report page: it tells every linear, needs no network, and survives names and files of any
kind."""

import json
import re
from html.parser import HTMLParser

import pytest

from awq.errors import CheckpointError
from awq.quantize.report import LinearReport, QuantReport
from awq.report import read_report, render_page, render_text

HOSTILE = '<script>alert("x")</script>'
VOID_TAGS = {"meta", "br"}


def linear(name, loss=0.01, nearest=0.04):
    return LinearReport(
        name=name,
        shape=(8, 16),
        kind="duo",
        ratio=0.5,
        loss=loss,
        loss_rtn=nearest,
        clip_fraction=0.25,
        rounding="feedback",
        producer="norm",
        reason="",
        seconds=0.1,
    )


@pytest.fixture
def report():
    report = QuantReport(config={"w_bit": 4}, options={"preset": "fast"}, tokens=1234, seconds=5.0)
    report.linears = [
        linear(f"layers.{block}.{role}") for block in range(3) for role in ("q_proj", "down_proj")
    ]
    report.skipped = {
        "lm_head": "outside the repeated blocks",
        HOSTILE: "its weight is read past its forward",
    }
    report.phases = {"rounding": 4.0, "search": 1.0}
    return report


class Tags(HTMLParser):
    """Opened and closed tags, and everything that would leave the page."""

    def __init__(self):
        super().__init__()
        self.open, self.outside, self.texts = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID_TAGS:
            self.open.append(tag)
        if tag in ("script", "link", "img", "iframe") or any(
            name in ("src", "href") for name, _ in attributes
        ):
            self.outside.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def page_of(report, directory):
    report.save(directory / "quantization_report.json")
    view = read_report(directory)
    page = render_page(view)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.outside == []
    return view, " ".join(tags.texts)


def test_page_tells_every_linear_and_every_dense_name(report, tmp_path):
    view, text = page_of(report, tmp_path)
    assert all(item.name in text for item in report.linears)
    assert all(name in text for name in report.skipped)
    assert [item.block for item in view.linears] == [0, 0, 1, 1, 2, 2]
    assert "25 %" in text  # of nearest rounding's error: 0.01 of 0.04
    assert HOSTILE in render_text(view)


@pytest.mark.parametrize(
    "missing",
    ["skipped", "phases", "tokens", "options", "versions", "warnings", "evaluation", "resources"],
)
def test_reports_without_a_part_still_draw(report, tmp_path, missing):
    raw = report.to_dict()
    del raw[missing]
    (tmp_path / "quantization_report.json").write_text(json.dumps(raw))
    assert "layers.2.down_proj" in render_page(read_report(tmp_path))


def test_a_report_of_nothing_draws(tmp_path):
    page_of(QuantReport(config={}, options={}), tmp_path)


def test_tokens_per_expert_are_drawn(report, tmp_path):
    raw = report.to_dict() | {
        "experts": {
            "layers.0": {"routed": [10, 0, 30], "borrowed": [0, 9, 0]},
            "layers.1": {"routed": [7, 7, 7], "borrowed": [0, 0, 0]},
        }
    }
    (tmp_path / "quantization_report.json").write_text(json.dumps(raw))
    page = render_page(read_report(tmp_path))
    assert "block 0, expert 2: 30 tokens" in page
    assert "saw 0 tokens" in page


def figures(kl):
    """As an evaluation of a language model has them."""
    return {
        "perplexity_before": 8.0,
        "perplexity_after": 10.0,
        "mean_kl": kl,
        "kl_interval": [kl / 2, 2 * kl],
        "top1_agreement": 0.75,
    }


def text_of(report, directory, **parts):
    (directory / "quantization_report.json").write_text(json.dumps(report.to_dict() | parts))
    page = render_page(read_report(directory))
    tags = Tags()
    tags.feed(page)
    assert tags.open == [] and tags.outside == []
    return page, " ".join(" ".join(tags.texts).split())


def test_one_text_before_and_after(report, tmp_path):
    _, text = text_of(report, tmp_path, evaluation=figures(0.25))
    assert "perplexity 8.000 10.000" in text and "80.0 %" in text and "75.00 %" in text
    assert "0.2500 (95 %: 0.1250–0.5000)" in text


def test_kl_of_every_kind_of_text_is_drawn(report, tmp_path):
    texts = {"kinds/code.txt": figures(0.5), "kinds/chat.txt": figures(0.125)}
    page, text = text_of(report, tmp_path, evaluation={"texts": texts})
    chart = page[page.index("KL divergence by text") :]
    bars = re.findall(r'<rect class="bar" x="\d+" y="\d+" width="([\d.]+)"', chart)
    assert "code.txt" in text and "chat.txt: perplexity" in text and "kinds/" not in text
    assert float(bars[0]) == pytest.approx(4 * float(bars[1]), rel=1e-2)


def test_texts_of_one_name_keep_their_folders(report, tmp_path):
    texts = {"en/chat.txt": figures(0.5), "zh/chat.txt": figures(0.25), "a/b.txt": figures(0.1)}
    page, text = text_of(report, tmp_path, evaluation={"texts": texts})
    assert all(f"{name}: perplexity" in text for name in ("en/chat.txt", "zh/chat.txt", " b.txt"))
    assert all(f">{name}</text>" in page for name in ("en/chat.txt", "zh/chat.txt", "b.txt"))


def test_experts_of_a_layer_are_one_place(report, tmp_path):
    """However many there are; and figures of a column have their digits, zeros too."""
    report.linears += [
        linear(f"layers.{block}.mlp.experts.{expert}.w1", loss=0.0094, nearest=0.2)
        for block in range(2)
        for expert in range(80)
    ]
    _, text = text_of(report, tmp_path)
    assert "mlp.experts.*.w1 0.940 % 20.0 % 5 % 160 of 160 25 %" in text


@pytest.mark.parametrize(
    "strange", [{"texts": {"a": 5}}, figures(0.1) | {"perplexity_after": 0}, {"mean_kl": "x"}]
)
def test_figures_of_another_version_are_listed(report, tmp_path, strange):
    _, text = text_of(report, tmp_path, evaluation=strange)
    assert "Measured before and after" in text


def test_the_plan_stands_beside_what_was_measured(report, tmp_path):
    measured = {"memory": 2e9, "gpu_memory": 0, "seconds": 130.0}
    _, text = text_of(report, tmp_path, resources={"measured": measured})
    assert "memory of the process, peak 2.00 GB" in text and "GPU memory" not in text
    planned = {"memory": 3e9, "gpu_memory": 0, "seconds": 100.0}
    _, text = text_of(report, tmp_path, resources={"measured": measured, "planned": planned})
    assert "memory of the process, peak 3.00 GB 2.00 GB time 1 min 40 s 2 min 10 s" in text


def test_labels_have_room_on_a_phone(report, tmp_path):
    """A letter takes 12.5 of the 720 units there; no label begins before the left edge."""
    long = "a/folder/with-a-name-that-is-far-longer-than-a-phone-is-wide.txt"
    experts = {
        f"model.language_model.layers.{block}.mlp.experts": {"routed": [3, 5]} for block in (9, 10)
    }
    report.linears.append(linear("layers.3.q_proj", loss=2e-6))
    page, text = text_of(
        report,
        tmp_path,
        evaluation={"texts": {long: figures(0.5), "b.txt": figures(0.1)}},
        experts=experts,
        phases={"a phase with a long name": 4000.0},
    )
    ends = re.findall(r'<text class="axis" x="([\d.]+)"[^>]*text-anchor="end">([^<]*)<', page)
    assert {"block 9", "block 10"} <= {label for _, label in ends}
    assert all(float(x) >= 12.5 * len(label) for x, label in ends), ends
    starts = re.findall(r'<text class="axis" x="([\d.]+)" y="\d+">([^<]*)<', page)
    assert all(float(x) + 12.5 * len(label) <= 720 for x, label in starts), starts
    assert "1 h 06 min" in text


LINE = {"name": "layers.0.q_proj", "loss": 0.1, "loss_rtn": 0.2}
NO_REPORTS = [
    "",
    "[]",
    "{}",
    '{"linears": [{"name": 3}]}',
    '{"linears": 5}',
    "\x00",
    "[" * 100_000,
    *(
        json.dumps({"linears": [LINE], part: value})
        for part, value in {
            "config": [1],
            "skipped": "x",
            "experts": {"layers.0": {"routed": ["x"]}},
            "phases": {"search": "x"},
            "loss": "x",
            "tokens": [1],
            "warnings": 5,
            "evaluation": "good",
            "resources": {"measured": {"memory": "x"}},
        }.items()
    ),
    json.dumps({"linears": [LINE | {"loss": 1e400}]}),
]


@pytest.mark.parametrize("content", NO_REPORTS)
def test_what_is_no_report_is_refused(tmp_path, content):
    (tmp_path / "quantization_report.json").write_text(content)
    with pytest.raises(CheckpointError, match="no quantization report|JSON"):
        read_report(tmp_path)


def test_nothing_of_a_report_becomes_markup(tmp_path):
    mark = "<script>alert(1)</script>"
    raw = {
        "linears": [LINE | {"name": f"layers.0.{mark}", "kind": mark, "producer": mark}],
        "config": {"w_bit": mark, mark: mark},
        "skipped": {mark: mark},
        "warnings": [mark],
        "phases": {mark: 1.0},
        "experts": {mark: {"routed": [1, 2]}},
        "evaluation": {mark: {mark: mark}},
    }
    (tmp_path / "quantization_report.json").write_text(json.dumps(raw))
    assert "<script" not in render_page(read_report(tmp_path))


def test_a_missing_report_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="quantization_report.json does not exist"):
        read_report(tmp_path)
