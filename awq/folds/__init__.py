"""Folds: scales that move between a producer and its consumers; discovered on the model itself and
proven by experiment."""

from awq.folds.discovery import discover
from awq.folds.fold import Fold, InputGroup, apply_fold
from awq.folds.proof import TOLERANCE, prove

__all__ = ["TOLERANCE", "Fold", "InputGroup", "apply_fold", "discover", "prove"]
