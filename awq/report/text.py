"""The report as a few lines for a terminal."""

from __future__ import annotations

from awq.report.read import ReportView

WORST_SHOWN = 5


def render_text(view: ReportView) -> str:
    """Totals, the linears with the largest errors, and what stayed dense."""
    share = 100 * view.loss / view.loss_nearest if view.loss_nearest else 0.0
    lines = [
        f"{view.title}: {len(view.linears)} linears in 4 bits, {len(view.skipped)} dense",
        f"relative output error {view.loss:.4f}, rounding to nearest {view.loss_nearest:.4f} "
        f"({share:.0f} % left)",
        "",
        "largest errors",
    ]
    worst = sorted(view.linears, key=lambda linear: -linear.loss)[:WORST_SHOWN]
    width = max((len(linear.name) for linear in worst), default=0)
    lines += [
        f"  {item.name:<{width}}  {item.loss:.4f}  nearest {item.loss_nearest:.4f}"
        for item in worst
    ]

    if view.skipped:
        lines += ["", "dense"]
        lines += [
            f"  {name}: {reason}" for name, reason in list(view.skipped.items())[:WORST_SHOWN]
        ]
        hidden = len(view.skipped) - WORST_SHOWN
        lines += [f"  and {hidden} more"] if hidden > 0 else []

    return "\n".join(lines)
