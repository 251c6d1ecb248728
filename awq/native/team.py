"""`Team`: whether helpers are worth waking."""

from __future__ import annotations


class Team:
    """Whether helpers make a call quicker, judged by the last calls with and without them.

    On a quiet machine they do; beside busy processes a helper may wait for its core in the middle
    of its work. Which of the two it is changes by the minute, so every `RETRY_CALLS`-th call takes
    the other way. The first call is not judged: memory and caches are cold, whoever computes.
    """

    RETRY_CALLS = 16
    NEW_SHARE = 0.25  # of the newest call in the average

    def __init__(self) -> None:
        self._seconds: dict[bool, float] = {}
        self._calls = 0
        self._is_cold = True

    def is_worth_it(self) -> bool:
        self._calls += 1
        if len(self._seconds) < 2:
            return True not in self._seconds
        better = self._seconds[True] < self._seconds[False]
        return not better if self._calls % self.RETRY_CALLS == 0 else better

    def note(self, together: bool, seconds_per_token: float) -> None:
        if self._is_cold:
            self._is_cold = False
            return

        before = self._seconds.get(together, seconds_per_token)
        self._seconds[together] = before + self.NEW_SHARE * (seconds_per_token - before)
