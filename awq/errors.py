"""One tree of errors. A message says what happened, with which values, and what to do about it."""

MAX_MESSAGE_CHARACTERS = 2000


class AwqError(Exception):
    """Base of every error this package raises on purpose.

    Messages quote names and values out of other people's files. Control characters in them are
    escaped, so that a message is one line and does nothing to a terminal, and what is endless is
    cut.

    >>> str(AwqError("a\\x1b[2Jb"))
    'a\\\\x1b[2Jb'
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(_one_line(value) if isinstance(value, str) else value for value in args))


def _one_line(text: str) -> str:
    line = " ".join(part.strip() for part in text.splitlines()) if "\n" in text else text
    if len(line) > MAX_MESSAGE_CHARACTERS:
        half = MAX_MESSAGE_CHARACTERS // 2
        line = f"{line[:half]} … {line[-half:]}"
    return line if line.isprintable() else "".join(map(_escaped, line))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")


def first_line(error: BaseException, longest: int = 200) -> str:
    """The first line of an error's message that says something, cut to `longest` characters; the
    error's kind when none does."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    return line if len(line) <= longest else line[: longest - 1] + "…"


class ConfigError(AwqError, ValueError):
    """A setting has a value that cannot work (unknown version, group size that does not divide,
    wrong keys)."""


class CalibrationError(AwqError, ValueError):
    """Calibration data is missing, empty or of a kind that is not understood."""


class ModelError(AwqError, ValueError):
    """The model cannot be found, or has no repeated blocks with linear layers to quantize."""


class CheckpointError(AwqError, OSError):
    """A checkpoint cannot be read or written (truncated file, missing tensor, no space left)."""
