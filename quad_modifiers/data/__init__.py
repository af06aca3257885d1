"""`calibration_windows`: token windows from Wikipedia articles, Python sources and local files on the machine."""

from quad_modifiers.data.calibration import CalibrationSource, as_dataloader, calibration_windows
from quad_modifiers.data.calibration_texts import calibration_texts
from quad_modifiers.data.local_files import local_texts
from quad_modifiers.data.news import news_articles
from quad_modifiers.data.stdlib_code import stdlib_code
from quad_modifiers.data.wikipedia import TextPart, wikipedia_articles
from quad_modifiers.data.windows import token_windows

__all__ = [
    "CalibrationSource",
    "TextPart",
    "as_dataloader",
    "calibration_texts",
    "calibration_windows",
    "local_texts",
    "news_articles",
    "stdlib_code",
    "token_windows",
    "wikipedia_articles",
]
