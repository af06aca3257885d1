"""Pages of Python's language reference, which `help()` shows: prose on every machine, under Python's own license."""

from functools import lru_cache

from quad_modifiers.data.wikipedia import TextPart, half_of

_MINIMUM_CHARACTERS = 300


def reference_pages(part: TextPart) -> list[str]:
    """Returns the pages of one half, in alphabetical order of their names.

    Pages repeat passages of each other; each passage is kept once, so that the halves have none in common. The text
    depends on the running Python version.

    Args:
        part: "calibration" for the first half of the pages, "held_out" for the second half.

    Raises:
        ValueError: if `part` is neither of the two.
        ImportError: if this Python ships without the pages.
    """
    return list(half_of(_pages(), part))


@lru_cache(maxsize=1)
def _pages() -> tuple[str, ...]:
    """Returns the pages without what a longer page has, those of some length."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ImportError(
            "this Python has no pydoc_data, whose pages are the default text without gensim; give your own text"
        ) from error
    seen: set[str] = set()
    kept = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = [each for each in topics[name].strip().split("\n\n") if each.strip() and each not in seen]
        seen.update(paragraphs)
        kept[name] = "\n\n".join(paragraphs)
    return tuple(kept[name] for name in sorted(kept) if len(kept[name]) >= _MINIMUM_CHARACTERS)
