"""Calibration data: from texts, token ids, files or datasets to masked batches of token ids."""

from awq.calibration.batches import CalibrationBatch, load_calibration
from awq.calibration.cleaning import clean_texts
from awq.calibration.tokens import prepare_calibration_tokens

__all__ = ["CalibrationBatch", "clean_texts", "load_calibration", "prepare_calibration_tokens"]
