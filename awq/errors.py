"""One tree of errors. A message says what happened, with which values, and what to do about it."""


class AwqError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(AwqError, ValueError):
    """A setting has a value that cannot work (unknown version, group size that does not divide, wrong keys)."""


class CalibrationError(AwqError, ValueError):
    """Calibration data is missing, empty or of a kind that is not understood."""


class ModelError(AwqError, ValueError):
    """The model cannot be found, or has no repeated blocks with linear layers to quantize."""


class CheckpointError(AwqError, OSError):
    """A checkpoint cannot be read or written (truncated file, missing tensor, no space left)."""
