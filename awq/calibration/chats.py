"""Chats as calibration data: messages in the spellings that people have, written as the model reads
them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from awq.calibration.cleaning import repaired
from awq.calibration.templates import TemplateTimeout, apply_chat_template
from awq.errors import CalibrationError, first_line

CHAT_DATE = datetime(2025, 1, 1)  # "today", for templates that ask

_HUMAN_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def is_message(item: Any) -> bool:
    """Whether `item` is one message of a chat, in OpenAI's spelling or in ShareGPT's."""
    return isinstance(item, Mapping) and ("role" in item or {"from", "value"} <= set(item))


def chat_text(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """A chat as the model reads it: through the tokenizer's own template.

    messages: {"role": …, "content": …}. tools: JSON schemas of the functions that may be called.
    Raises CalibrationError when there is no template, or when it fails or does not end.
    """
    if getattr(tokenizer, "chat_template", None) is None or not hasattr(
        tokenizer, "apply_chat_template"
    ):
        raise CalibrationError(
            "calibration data holds chat messages, which need a tokenizer with a chat template "
            "(apply_chat_template); "
            "give the model's own tokenizer, or texts."
        )
    try:
        settings = _fixed_date(tokenizer.chat_template)
        if tools is not None:
            settings["tools"] = list(tools)
        return repaired(apply_chat_template(tokenizer, messages, tokenize=False, **settings))
    except TemplateTimeout:
        raise
    # a template is a program of the model's author: it may raise anything
    except Exception as error:
        reason = first_line(error)
        raise CalibrationError(
            f"the chat template cannot take a chat of {len(messages)} messages: {reason}"
        ) from error


def _fixed_date(template: Any) -> dict[str, Any]:
    """Values for templates that write today's date: equal data must give equal rows on any day."""
    values: dict[str, Any] = {
        "strftime_now": CHAT_DATE.strftime,
        "date_string": CHAT_DATE.strftime("%d %b %Y"),
    }
    return {name: value for name, value in values.items() if name in str(template)}


def turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with role and content, whether it has them already or {"from": …, "value": …} as
    ShareGPT's files."""
    if "from" not in message:
        return dict(message)
    role = str(message["from"])
    return {"role": _HUMAN_NAMES.get(role, role), "content": message.get("value")}
