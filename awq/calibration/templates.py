"""Chat templates with a limit of time.

A template is a program of whoever made the model. transformers runs it in Jinja's sandbox, which
keeps it from files and from Python's insides, and not from loops within loops that would end after
years.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from awq.errors import CalibrationError

MAX_SECONDS = 5.0  # for one chat; usual templates need less than a thousandth of it
TEMPLATE_FILES = ("<template>", "<unknown>")  # what Jinja calls code of templates out of strings


class TemplateTimeout(CalibrationError):
    """A chat template that did not end in time."""


def apply_chat_template(tokenizer: Any, messages: Sequence[Any], **settings: Any) -> Any:
    """What `tokenizer.apply_chat_template(messages, **settings)` gives.

    Raises TemplateTimeout after `MAX_SECONDS`; whatever else the template raises is passed on.
    """
    with _time_limit(MAX_SECONDS):
        return tokenizer.apply_chat_template(list(messages), **settings)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Lines of templates that this thread runs inside raise TemplateTimeout once the time is over.

    Python's tracing does it: a signal would reach the main thread alone, and another thread could
    not be ended. A debugger that was tracing goes on afterwards.
    """
    deadline = time.monotonic() + seconds

    def line(frame: FrameType, _event: str, _value: Any) -> Callable:
        if time.monotonic() > deadline:
            raise TemplateTimeout(
                f"the chat template did not end within {seconds:g} s; "
                "give a tokenizer with another template."
            )
        return line

    def call(frame: FrameType, _event: str, _value: Any) -> Callable | None:
        return line if frame.f_code.co_filename in TEMPLATE_FILES else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)
