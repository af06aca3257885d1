"""`calibration_windows`: token windows from text, conversations and token ids, of one source or several."""

from quad_modifiers.data.calibration import (
    CalibrationSource,
    as_dataloader,
    calibration_data,
    calibration_reading,
    calibration_windows,
)
from quad_modifiers.data.calibration_texts import calibration_texts, held_out_name, held_out_prose
from quad_modifiers.data.local_files import local_texts
from quad_modifiers.data.mixture import named_sources
from quad_modifiers.data.news import news_articles
from quad_modifiers.data.stdlib_code import stdlib_code
from quad_modifiers.data.used import CalibrationData, SourceUsed, describe_sources
from quad_modifiers.data.wikipedia import TextPart, wikipedia_articles
from quad_modifiers.data.windows import token_windows

__all__ = [
    "CalibrationData",
    "CalibrationSource",
    "SourceUsed",
    "TextPart",
    "as_dataloader",
    "calibration_data",
    "calibration_reading",
    "calibration_texts",
    "calibration_windows",
    "describe_sources",
    "held_out_name",
    "held_out_prose",
    "local_texts",
    "named_sources",
    "news_articles",
    "stdlib_code",
    "token_windows",
    "wikipedia_articles",
]
