"""The report as one HTML page that opens offline: no script, no font, no request.

A section stands for a question a user asks after quantizing: Is it good? Where was error lost? What
stayed dense, and why? Which experts saw too few tokens? Where did the time go? A section without
data is left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from awq.checkpoint.recovery import divergence_by_text, recovery_rows
from awq.report.charts import bar_chart, error_chart, heat_map
from awq.report.read import Linear, ReportView

# marks in the chart of errors; larger models are drawn by their worst linears per bin
MAX_POINTS = 400
MAX_LABEL = 24  # letters beside a bar
_INDEX = re.compile(r"\.\d+(?=\.)")

ABOUT_ERRORS = (
    "How much the rounding of its weights changed a linear's output on the calibration text: the "
    "energy of the difference, as a share of the output's energy."
)
ABOUT_PLACES = (
    "Means over all blocks and experts. With scales: activation-aware scales were folded into the "
    "layer before; where none can take them, the list at the end says why. Narrowed groups: share "
    "of groups of weights whose largest values were clipped, which makes steps finer."
)
NOT_MEASURED = (
    "Nothing was compared with the original. Quantize with <code>--evaluate FILE</code>, or run "
    "<code>awq eval DIR --base ORIGINAL --text FILE</code>."
)


def render_page(view: ReportView) -> str:
    """The whole page as a string of HTML."""
    sections = [
        _head(view),
        _warnings(view),
        _evaluation(view),
        _errors(view),
        _roles(view),
        _experts(view),
        _dense(view),
        _time(view),
        _resources(view),
        _settings(view),
        _all_linears(view),
    ]
    body = "\n".join(section for section in sections if section)
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")

    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(view.title)}: quantization "
        f"report</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _head(view: ReportView) -> str:
    share = view.loss / view.loss_nearest if view.loss_nearest else 0.0
    tiles = [
        (f"{100 * share:.0f} %", "of nearest rounding's error is left"),
        (f"{len(view.linears)}", f"linears in {escape(str(_bits(view)))} bits"),
        (
            f"{len(view.skipped)}",
            "linear kept dense" if len(view.skipped) == 1 else "linears kept dense",
        ),
        (f"{int(view.raw.get('tokens') or 0):,}", "calibration tokens"),
        (_duration(float(view.raw.get("seconds") or 0.0)), "to quantize"),
    ]
    drawn = "\n".join(
        f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for value, label in tiles
    )
    lead = (
        f"Output error {_share(view.loss)}, rounding to nearest {_share(view.loss_nearest)} (mean "
        "over linears)."
    )

    return (
        f'<h1>{escape(view.title)}</h1>\n<p class="lead">{lead}</p>\n<div '
        f'class="tiles">\n{drawn}\n</div>'
    )


def _bits(view: ReportView) -> Any:
    return (view.raw.get("config") or {}).get("w_bit", 4)


def _warnings(view: ReportView) -> str:
    texts = view.raw.get("warnings") or []
    return "\n".join(f'<p class="warning">{escape(str(text))}</p>' for text in texts)


def _evaluation(view: ReportView) -> str:
    """Figures before and after, whatever was measured: cosines of embeddings, KL divergence by kind
    of text, perplexity."""
    measured = view.raw.get("evaluation") or {}
    title = "<h2>Measured before and after</h2>"
    if not measured:
        return f'{title}\n<p class="note">{NOT_MEASURED}</p>'

    try:
        rows = recovery_rows(measured)
        divergences = divergence_by_text(measured)
    except (KeyError, TypeError, ValueError, ArithmeticError):  # figures of another version
        rows = [
            (name.replace("_", " "), "", _figure(value))
            for name, value in _flat(measured)
            if value is not None
        ]
        divergences = {}

    table = _table(["figure", "original", "quantized"], rows, numeric={1, 2}, wraps=True)
    bars = [(_short(name), value, f"{value:.4f}") for name, value in divergences.items()]
    chart = bar_chart(bars, "KL divergence by text, nats a token")
    key = '<p class="note">KL divergence from the original, nats a token:</p>' if chart else ""

    return f"{title}\n{key}\n{chart}\n{table}"


def _errors(view: ReportView) -> str:
    chart = error_chart(
        [(item.name, item.loss, item.loss_nearest) for item in _thinned(view.linears)]
    )
    if not chart:
        return ""

    key = '<p class="key"><i class="k1"></i>rounded to nearest<i class="k2"></i>this run</p>'
    note = f'<p class="note">{ABOUT_ERRORS}</p>'

    return f"<h2>Error of every linear</h2>\n{note}\n{key}\n{chart}"


def _thinned(linears: list[Linear]) -> list[Linear]:
    """At most MAX_POINTS linears: of every run of neighbours, the one with the largest error."""
    size = -(-len(linears) // MAX_POINTS)
    if size <= 1:
        return linears
    runs = [linears[start : start + size] for start in range(0, len(linears), size)]
    return [max(run, key=lambda linear: linear.loss) for run in runs]


def _roles(view: ReportView) -> str:
    """Means over the blocks, by the linear's place in its block; all experts are one place."""
    by_role: dict[str, list[Linear]] = defaultdict(list)
    for linear in view.linears:
        by_role[_INDEX.sub(".*", linear.role)].append(linear)
    if not 1 < len(by_role) <= 60:
        return ""

    rows = []
    for role, members in by_role.items():
        loss = _mean([m.loss for m in members])
        nearest = _mean([m.loss_nearest for m in members])
        scaled = sum(m.kind != "identity" for m in members)
        narrowed = _mean([m.clip_fraction for m in members])
        left = f"{100 * loss / nearest:.0f} %" if nearest else "–"
        rows.append(
            (
                role,
                _share(loss),
                _share(nearest),
                left,
                f"{scaled} of {len(members)}",
                f"{100 * narrowed:.0f} %",
            )
        )

    heads = ["linear", "error", "nearest", "left", "with scales", "narrowed groups"]
    note = f'<p class="note">{ABOUT_PLACES}</p>'
    table = _table(heads, rows, numeric={1, 2, 3, 4, 5})

    return f"<h2>By place in the block</h2>\n{note}\n{table}"


def _experts(view: ReportView) -> str:
    names = [_block_label(name) for name in view.experts]
    if len(set(names)) < len(names):
        names = [_short(name) for name in view.experts]
    rows = list(zip(names, ([float(v) for v in values] for values in view.experts.values())))
    chart = heat_map(rows, "Calibration tokens per expert, one row per layer")
    if not chart:
        return ""

    fewest = min(min(values) for _, values in rows)
    note = f'<p class="note">The least used expert saw {fewest:,.0f} tokens.</p>'

    return f"<h2>Tokens per expert</h2>\n{note}\n{chart}"


def _dense(view: ReportView) -> str:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in view.skipped.items():
        by_reason[reason].append(name)
    if not by_reason:
        return ""

    rows = []
    for reason, names in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        rows.append((reason, str(len(names)), shown))

    return (
        "<h2>What stayed dense, and "
        f"why</h2>\n{_table(['reason', 'linears', 'names'], rows, numeric={1})}"
    )


def _time(view: ReportView) -> str:
    phases = sorted((view.raw.get("phases") or {}).items(), key=lambda item: -item[1])
    rows = [(name, float(seconds), _duration(float(seconds))) for name, seconds in phases]
    chart = bar_chart(rows, "Seconds per phase")
    return f"<h2>Where the time went</h2>\n{chart}" if chart else ""


def _resources(view: ReportView) -> str:
    """What the run took of the machine, beside what was planned where it was planned."""
    planned, measured = (view.resources.get(name, {}) for name in ("planned", "measured"))
    forms = (
        ("memory", "memory of the process, peak", _gigabytes),
        ("gpu_memory", "GPU memory, peak", _gigabytes),
        ("seconds", "time", _duration),
    )

    rows: list[tuple[str, ...]] = []
    for key, label, shown in forms:
        if not measured.get(key):
            continue
        plan = [shown(planned[key]) if planned.get(key) else "–"] if planned else []
        rows.append((label, *plan, shown(measured[key])))

    if not rows:
        return ""

    heads = ["", "planned", "measured"] if planned else ["", "measured"]
    return f"<h2>Memory and time</h2>\n{_table(heads, rows, numeric={1, 2})}"


def _settings(view: ReportView) -> str:
    rows = []
    for part in ("config", "options", "versions"):
        rows += [
            (part, name, _figure(value))
            for name, value in (view.raw.get(part) or {}).items()
            if value is not None
        ]

    if not rows:
        return ""

    table = _table(["", "setting", "value"], rows)
    return f"<details>\n<summary>Settings and versions</summary>\n{table}\n</details>"


def _all_linears(view: ReportView) -> str:
    rows = []
    for linear in view.linears:
        if linear.producer:
            scale = f"{linear.kind} {linear.ratio:g}, in {linear.producer}"
        else:
            scale = linear.reason or linear.kind

        shape = " × ".join(str(size) for size in linear.shape)
        rows.append((linear.name, shape, _share(linear.loss), _share(linear.loss_nearest), scale))

    table = _table(["linear", "shape", "error", "nearest", "scale"], rows, numeric={1, 2, 3})
    return f"<details>\n<summary>Every linear ({len(rows)})</summary>\n{table}\n</details>"


def _table(
    heads: list[str],
    rows: Sequence[tuple[str, ...]],
    numeric: Collection[int] = (),
    wraps: bool = False,
) -> str:
    """numeric: indices of the columns of numbers. wraps: on a phone these may take several lines,
    so that all columns are seen."""

    def line(tag: str, texts: Sequence[str]) -> str:
        cells = []
        for index, text in enumerate(texts):
            kind = ' class="n"' if index in numeric else ""
            cells.append(f"<{tag}{kind}>{escape(text)}</{tag}>")
        return "<tr>" + "".join(cells) + "</tr>"

    head = line("th", heads)
    body = "\n".join(line("td", row) for row in rows)
    table = f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"

    return f'<div class="scroll{" wraps" if wraps else ""}">{table}</div>'


def _flat(value: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Nested dicts as one list of (path, value)."""
    found: list[tuple[str, Any]] = []
    for name, item in value.items():
        path = f"{before}{name}"
        found += _flat(item, f"{path} ") if isinstance(item, dict) else [(path, item)]
    return found


def _figure(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _short(name: str) -> str:
    """A name, and of a long one its end: charts have little room beside their bars."""
    return name if len(name) <= MAX_LABEL else f"…{name[1 - MAX_LABEL :]}"


def _block_label(name: str) -> str:
    """The first number in a name, which counts blocks; the name itself where it has none."""
    found = re.search(r"\.(\d+)(?:\.|$)", name)
    return f"block {found.group(1)}" if found else _short(name)


def _share(value: float) -> str:
    """A share in percent with three digits, zeros at the end too, so that columns align."""
    return f"{100 * value:#.3g}".rstrip(".") + "\u00a0%"


def _duration(seconds: float) -> str:
    """With spaces that no line breaks between a number and its unit."""
    if seconds < 100:
        return f"{seconds:.1f}\u00a0s"

    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u00a0min {rest:02d}\u00a0s"

    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u00a0h {minutes:02d}\u00a0min"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))
