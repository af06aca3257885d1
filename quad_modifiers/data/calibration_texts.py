"""The text that calibrates, trains and measures where the user gives none: prose with code in it."""

import logging
from collections.abc import Sequence

from quad_modifiers.data.python_reference import reference_pages
from quad_modifiers.data.stdlib_code import stdlib_code
from quad_modifiers.data.wikipedia import INSTALL_TEXT, has_gensim, wikipedia_articles

logger = logging.getLogger(__name__)

DESCRIPTION = "gensim's Wikipedia articles and modules of Python's standard library, of the halves that calibrate"
SMALL_DESCRIPTION = (
    "pages of Python's language reference and modules of its standard library, of the halves that calibrate "
    "(the small default text, without gensim)"
)
_HELD_OUT = "held-out Wikipedia articles of gensim"
_SMALL_HELD_OUT = "held-out pages of Python's language reference"

# Every second module is about a third of the tokens; of the small text every tenth is half of it.
_MODULE_STEP = 2
_SMALL_MODULE_STEP = 10


def default_text_name() -> str:
    """Returns the name of `calibration_texts()` here, for readers: it says which of the two texts it is."""
    return DESCRIPTION if has_gensim() else SMALL_DESCRIPTION


def calibration_texts() -> list[str]:
    """Returns articles and, spread evenly among them, sources of Python modules, all of the calibration halves.

    A model calibrated on prose alone loses much more on code than on prose; with a third of code it loses far less on
    code, and some more on prose (docs/concepts/quality.md). The held-out halves are left for measuring.

    The articles come from gensim. Without it, pages of Python's language reference take their place, with a warning:
    the published numbers are of the articles.

    Raises:
        FileNotFoundError: if this Python ships without the sources of its standard library.
    """
    if has_gensim():
        prose, modules = wikipedia_articles("calibration"), stdlib_code("calibration")[::_MODULE_STEP]
    else:
        logger.warning(
            "gensim is not installed, so %s stand in for its Wikipedia articles. %s, or give a text of your own (a "
            "--dataset)",
            "pages of Python's language reference",
            INSTALL_TEXT,
        )
        prose, modules = reference_pages("calibration"), stdlib_code("calibration")[::_SMALL_MODULE_STEP]
    placed = [((index + 0.5) / len(texts), text) for texts in (prose, modules) for index, text in enumerate(texts)]
    return [text for _, text in sorted(placed, key=lambda each: each[0])]


def held_out_prose() -> Sequence[str]:
    """Returns prose that never calibrates: gensim's Wikipedia articles, or pages of Python's language reference."""
    return wikipedia_articles("held_out") if has_gensim() else reference_pages("held_out")


def held_out_name() -> str:
    """Returns the name of `held_out_prose()` here, for readers and records."""
    return _HELD_OUT if has_gensim() else _SMALL_HELD_OUT
