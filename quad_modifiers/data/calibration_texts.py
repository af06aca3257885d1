"""The text that calibrates and trains where the user gives none: prose with code in it."""

from quad_modifiers.data.stdlib_code import stdlib_code
from quad_modifiers.data.wikipedia import wikipedia_articles

DESCRIPTION = "gensim's Wikipedia articles and modules of Python's standard library, of the halves that calibrate"

_MODULE_STEP = 2  # every second module: about a third of the tokens are code


def calibration_texts() -> list[str]:
    """Returns articles and, spread evenly among them, sources of Python modules, all of the calibration halves.

    A model calibrated on prose alone loses much more on code than on prose; with a third of code it loses far less on
    code, and some more on prose (docs/concepts/quality.md). The held-out halves are left for measuring.

    Raises:
        ImportError: if gensim, which has the articles, is not installed.
        FileNotFoundError: if this Python ships without the sources of its standard library.
    """
    articles, modules = wikipedia_articles("calibration"), stdlib_code("calibration")[::_MODULE_STEP]
    placed = [((index + 0.5) / len(texts), text) for texts in (articles, modules) for index, text in enumerate(texts)]
    return [text for _, text in sorted(placed, key=lambda each: each[0])]
