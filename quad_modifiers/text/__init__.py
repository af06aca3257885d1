"""Real text that is already on the machine: Wikipedia articles, Python sources and local files, cut into windows."""

from quad_modifiers.text.calibration_texts import calibration_texts
from quad_modifiers.text.local_files import local_texts
from quad_modifiers.text.news import news_articles
from quad_modifiers.text.stdlib_code import stdlib_code
from quad_modifiers.text.wikipedia import TextPart, wikipedia_articles
from quad_modifiers.text.windows import token_windows

__all__ = [
    "TextPart",
    "calibration_texts",
    "local_texts",
    "news_articles",
    "stdlib_code",
    "token_windows",
    "wikipedia_articles",
]
