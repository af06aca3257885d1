"""Text that a tokenizer can read: halves of characters, as scraped JSON has them, are replaced."""

import logging
import re
from collections.abc import Sequence

logger = logging.getLogger(__name__)

_SURROGATE = re.compile("[\ud800-\udfff]")
_EXCERPT = 20  # characters on each side


def readable(texts: Sequence[str]) -> list[str]:
    """Returns texts in which every lone surrogate is the replacement character; a warning names the first.

    Two that make a character together become that character.

    Raises:
        TypeError: if `texts` is one string, or one of them is none.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of documents, not one string; wrap it in a list")
    found, broken = [], []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"every text must be a str, but text {index} is a {type(text).__name__}")
        match = _SURROGATE.search(text)
        if match is not None:
            mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            if mended.count("\ufffd") > text.count("\ufffd"):
                start = match.start()
                broken.append((index, text[max(0, start - _EXCERPT) : start + _EXCERPT]))
            text = mended
        found.append(text)
    if broken:
        logger.warning(
            "%d of %d texts hold half of a character (a lone surrogate), now replaced; the first is text %d, at %s",
            len(broken),
            len(found),
            broken[0][0],
            ascii(broken[0][1]),
        )
    return found
