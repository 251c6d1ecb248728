"""AutoAWQ's import path. `AwqQuantizer` is a name only: `quantize_model` is the quantizer, whatever class is passed."""


class AwqQuantizer:
    """Accepted as `quantizer_cls` for compatibility; `awq.quantize.quantize_model` does the work."""
