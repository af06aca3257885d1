"""Calibration and application of the outlier projection."""
