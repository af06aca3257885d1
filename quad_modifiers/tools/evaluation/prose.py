"""Paragraphs and sentences of Wikipedia articles, from which test items are made."""

import re

_MARKUP = re.compile(r"[\[\]{}|<>=]|''|https?:")
# A stop after two lower-case letters, digits or brackets: "U.S. Army", "Dr. No" and "J. Smith" stay whole.
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)][a-z0-9)][.!?]) (?=[A-Z])")


def paragraphs(article: str) -> list[list[str]]:
    """Returns the prose paragraphs of an article, each as its list of sentences, with single spaces.

    Lines that do not begin and end like a sentence are left out (headings, lists, captions), and so are lines with
    remains of mark-up.
    """
    lines = (" ".join(line.split()) for line in article.split("\n"))
    return [
        _SENTENCE_END.split(line)
        for line in lines
        if line and line[0].isupper() and line[-1] in ".!?" and not _MARKUP.search(line)
    ]


def word_count(text: str) -> int:
    """Returns the number of words, as white space separates them."""
    return len(text.split())
