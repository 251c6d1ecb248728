"""Sending a quantized directory to the hub.

What would stop the sending (a wrong name, no token, no network, a token that may only read) is
found by `check_push` before any work starts. All files travel in one commit, so that nobody meets
half of a model.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from awq.checkpoint.card import with_name
from awq.checkpoint.companions import companion_files
from awq.errors import CheckpointError, ConfigError, first_line

logger = logging.getLogger("awq.checkpoint")


def check_push(repository: str, token: str | None = None) -> None:
    """Asks the hub, in one request, whether this machine may write to `repository`.

    repository: "owner/name". token: default: the one that `hf auth login` stored, or HF_TOKEN.
    Raises ConfigError for a name that is none, no token, a token that is not accepted or may only
    read; CheckpointError where the hub cannot be reached. Nothing is created.
    """
    owner = _check_name(repository)
    user = _user(repository, _token(token))
    access = user.get("auth", {}).get("accessToken", {})
    role = access.get("role")
    if role == "read":
        raise ConfigError(
            f"the token {access.get('displayName', '')!r} may only read; pushing to {repository} "
            "needs one with write access (`hf auth login`, or HF_TOKEN)."
        )

    owners = [user.get("name"), *(one.get("name") for one in user.get("orgs", []))]
    if role == "write" and owner not in owners:  # a fine-grained token does not list its owners
        raise ConfigError(
            f"{user.get('name')} may not write to {owner}; push to one of "
            f"{', '.join(str(name) for name in owners)}."
        )


def push_directory(
    directory: str | Path,
    repository: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "4-bit AWQ weights",
) -> str:
    """Sends every file of a saved model to the hub in one commit; returns the commit's address.

    directory: what `save_quantized` wrote. repository: "owner/name"; made when there is none.
    private: of a new repository. The model card that is sent calls the model by the repository's
    name. Raises ConfigError as `check_push` does, CheckpointError for a directory without
    `config.json` or when sending fails; the directory stays as it is.

    Like `push_directory("my-model-awq", "my-name/my-model-awq")`.
    """
    root = Path(directory)
    if not root.is_dir() or not any(root.glob("**/config.json")):
        raise CheckpointError(f"{root} holds no saved model to push (no config.json).")

    _check_name(repository)
    chosen = _token(token)
    try:
        return _send(root, repository, private, chosen, commit_message)
    except Exception as error:  # the hub's client has many ways to fail
        raise CheckpointError(
            f"{root.name} could not be pushed to {repository}: {first_line(error)}"
        ) from error


def _send(root: Path, repository: str, private: bool, token: str, message: str) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    files: list[CommitOperationAdd] = []
    left_out: list[str] = []
    for path in companion_files(root, left_out):
        inner = path.relative_to(root).as_posix()
        is_card = inner == "README.md"
        content = with_name(path.read_bytes(), repository) if is_card else path
        files.append(CommitOperationAdd(inner, content))

    if left_out:
        logger.warning("not pushed, since they lie outside of %s: %s", root, ", ".join(left_out))
    api = HfApi(token=token)
    api.create_repo(repository, private=private, exist_ok=True)

    return str(api.create_commit(repository, files, commit_message=message).commit_url)


def _check_name(repository: str) -> str:
    """The owner in "owner/name"."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"cannot push to {repository!r}: {first_line(error)}") from error

    owner, slash, _ = repository.partition("/")
    if not slash:
        raise ConfigError(
            f"cannot push to {repository!r}: name the repository as owner/name, with the hub's "
            "name of you or of your organization."
        )
    return owner


def _token(given: str | None) -> str:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ConfigError("pushing needs the hub, and HF_HUB_OFFLINE is set; unset it.")

    token = given or get_token()
    if token is None:
        raise ConfigError(
            "pushing needs a token of the hub with write access: run `hf auth login`, or set "
            "HF_TOKEN."
        )
    return token


def _user(repository: str, token: str) -> dict[str, Any]:
    """What the hub knows about the owner of the token."""
    from huggingface_hub import HfApi, constants

    try:
        return HfApi(token=token).whoami()
    # of whichever client this release uses; before 1.0 a refusal is no HfHubHTTPError
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            raise ConfigError(
                f"{constants.ENDPOINT} does not accept the token: {first_line(error)}"
            ) from error
        raise CheckpointError(_unreachable(repository, error)) from error


def _unreachable(repository: str, error: Exception) -> str:
    from huggingface_hub import constants

    return (
        f"{constants.ENDPOINT} cannot be asked about {repository} ({first_line(error)}); "
        f"quantize without pushing, and `hf upload {repository} DIRECTORY` when it can."
    )
