"""How far long work is and when it will end: log lines, for places where no progress bar is drawn,
and both together."""

from __future__ import annotations

import logging
import time
from datetime import timedelta

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0

logger = logging.getLogger("awq.quantize")


class ProgressLines:
    """One line for the first and the last step, and at most one each `SECONDS_BETWEEN_LINES`
    between them.

    >>> lines = ProgressLines("block", total=24)
    >>> lines.done(1, "loss 0.0071")

    logs "block 1 of 24 done, loss 0.0071, 0:00:12 so far, about 0:04:36 left".
    """

    def __init__(self, unit: str, total: int) -> None:
        self.unit = unit
        self.total = total
        self.start = self.last = time.perf_counter()

    def done(self, steps: int, figures: str) -> None:
        """Called after every step; `steps` counts them from 1."""
        now = time.perf_counter()
        if 1 < steps < self.total and now - self.last < SECONDS_BETWEEN_LINES:
            return

        self.last = now
        spent = now - self.start
        left = spent / steps * (self.total - steps)
        logger.info(
            "%s %d of %d done, %s%s so far, about %s left",
            self.unit,
            steps,
            self.total,
            f"{figures}, " if figures else "",
            _clock(spent),
            _clock(left),
        )


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Progress(tqdm):
    """A progress bar and `ProgressLines`.

    >>> with Progress("tuning", "step", total=128, shown=None) as bar:
    ...     bar.done("kl 0.0871")

    shown: None means when stderr is a terminal.
    """

    def __init__(self, name: str, unit: str, total: int, shown: bool | None) -> None:
        hide = None if shown is None else not shown
        super().__init__(total=total, desc=f"AWQ {name}", unit=unit, disable=hide)
        self._lines = ProgressLines(f"{name} {unit}", total)
        self._count = 0

    def done(self, figures: str = "") -> None:
        """Called after every step."""
        self.update()
        self._count += 1
        self._lines.done(self._count, figures)
