"""About a hundred English Wikipedia articles, taken from the test data inside gensim's wheel.

They are real prose, need no network once the package is installed, and are the same on every machine. The first
half of the articles calibrates; the second half is held out for evaluation and never calibrates anything.
"""

import bz2
import importlib.util
import re
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Literal

TextPart = Literal["calibration", "held_out"]

_DUMP_GLOB = "enwiki-latest-pages-articles1.xml-*-shortened.bz2"
_MINIMUM_CHARACTERS = 1000
INSTALL_TEXT = "Install it with `pip install 'quad-modifiers[text]'` (Python 3.11 to 3.13 have a wheel)"
_INSTALL_HINT = f"{INSTALL_TEXT[0].lower()}{INSTALL_TEXT[1:]}, or give your own text (--dataset, `dataset`)"

_REDIRECT = re.compile(r"^\s*#redirect", re.IGNORECASE)
_RESIDUE = (  # what replaces what, in this order
    (re.compile(r"'{2,5}"), ""),  # emphasis
    (re.compile(r"\(\s*[,;]*\s*\)"), ""),  # brackets whose content was a template
    (re.compile(r"[ \t\u00a0]{2,}"), " "),
    (re.compile(r"[ \t]+$|^[ \t]+", re.MULTILINE), ""),
    (re.compile(r"\n{3,}"), "\n\n"),
)


def wikipedia_articles(part: TextPart) -> list[str]:
    """Returns the articles of one half, in the order of the file.

    Args:
        part: "calibration" for the first half of the articles, "held_out" for the second half.

    Returns:
        One string per article, wiki mark-up removed, at least 1000 characters each.

    Raises:
        ValueError: if `part` is neither of the two.
        ImportError: if gensim is not installed.
        FileNotFoundError: if the installed gensim does not contain the articles.
    """
    return list(half_of(_all_articles(), part))


def half_of(texts: tuple[str, ...], part: TextPart) -> tuple[str, ...]:
    """Returns the first ("calibration") or the second ("held_out") half of `texts`; a ValueError for any other part."""
    middle = len(texts) // 2
    halves = {"calibration": texts[:middle], "held_out": texts[middle:]}
    if part not in halves:
        raise ValueError(f"part must be 'calibration' or 'held_out', not {part!r}")
    return halves[part]


def clean_article(text: str) -> str:
    """Returns `text` without the residue of gensim's mark-up filter; headings keep their equal signs."""
    for pattern, replacement in _RESIDUE:
        text = pattern.sub(replacement, text)
    return text.strip()


@lru_cache(maxsize=1)
def _all_articles() -> tuple[str, ...]:
    """Returns every article of the dump that is neither a redirect nor tiny, cleaned."""
    found = sorted(gensim_test_data().glob(_DUMP_GLOB))
    if not found:
        raise FileNotFoundError(
            f"the installed gensim has no {_DUMP_GLOB} in its folder test/test_data; "
            "install the wheel of gensim 4.3 or later, or give your own text as `dataset`"
        )
    try:
        from gensim.corpora.wikicorpus import extract_pages, filter_wiki
    except ImportError as error:
        raise ImportError(f"gensim, whose wheel holds the articles, fails to import; {_INSTALL_HINT}") from error

    articles = []
    with bz2.open(found[0]) as dump:
        for _title, source, _page_id in extract_pages(dump, filter_namespaces=("0",)):
            if not source or _REDIRECT.match(source):
                continue
            article = clean_article(filter_wiki(source))
            if len(article) >= _MINIMUM_CHARACTERS:
                articles.append(article)
    return tuple(articles)


def has_gensim() -> bool:
    """Returns whether gensim is installed, without importing it."""
    return _gensim_spec() is not None


def _gensim_spec() -> ModuleSpec | None:
    try:
        spec = importlib.util.find_spec("gensim")
    except ImportError:  # something keeps it from being imported
        return None
    return spec if spec is not None and spec.submodule_search_locations else None


def gensim_test_data() -> Path:
    """Returns the folder of test data inside the installed gensim package; an ImportError if there is none."""
    spec = _gensim_spec()
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"this text comes from the package gensim, not installed here; {_INSTALL_HINT}")
    return Path(spec.submodule_search_locations[0]) / "test" / "test_data"
