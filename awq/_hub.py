"""Asking the hub once whether it is there: its client would try six times over half a minute."""

from __future__ import annotations

TIMEOUT_SECONDS = 10


def ask_hub_once() -> None:
    """Raises, after one request, where the hub cannot be reached. Silent in offline mode, in which
    the client refuses at once by itself."""
    from huggingface_hub import constants, get_session

    if not constants.HF_HUB_OFFLINE:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
