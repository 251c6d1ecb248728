"""The quantizer: `quantize_model` walks a model block by block and returns a `QuantReport`."""

from awq.quantize.options import QuantizeOptions
from awq.quantize.pipeline import quantize_model
from awq.quantize.report import LinearReport, QuantReport

__all__ = ["LinearReport", "QuantReport", "QuantizeOptions", "quantize_model"]
