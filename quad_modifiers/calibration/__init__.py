"""Calibration: the token windows that are run through the model, and what is learnt from them."""

from quad_modifiers.calibration.data import CalibrationSource, as_dataloader, calibration_windows

__all__ = ["CalibrationSource", "as_dataloader", "calibration_windows"]
