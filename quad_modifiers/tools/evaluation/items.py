"""The items of the offline tasks, from the held-out halves of the texts that this package's dependencies bring along.

Nothing in them calibrates: that is the other half of the articles and of the modules. The items are the same on every
machine: candidates come in the order of the text, and generators with a fixed seed choose among them. Those made of
source code depend on the version of Python, from whose standard library they are cut.

How items are made was settled with full-precision models alone, so that those score well between guessing and
certainty; docs/guide/evaluation.md has the scores.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from quad_modifiers.data import stdlib_code, wikipedia_articles

Item = dict[str, Any]
Range = tuple[int, int]
Article = list[list[str]]  # paragraphs of sentences

SEED = 0
COUNT = 450  # items of a task
CHOICES = 4

_MARKUP = re.compile(r"[\[\]{}|<>=]|''|https?:")
# A stop after two lower-case letters, digits or brackets: "U.S. Army", "Dr. No" and "J. Smith" stay whole.
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)][a-z0-9)][.!?]) (?=[A-Z])")
_LONG_WORD = re.compile(r"[A-Za-z]{4,}")
_LAST_WORD = re.compile(r"(?P<context>.*\w,?) (?P<word>[A-Za-z]{4,})\.", re.S)
_PASSAGE_WORDS: Range = (35, 75)
_CONTEXT_WORDS: Range = (20, 50)
_SENTENCE_WORDS: Range = (14, 28)  # of the sentence to be completed
_GIVEN_WORDS = 3  # of it
_NEAREST = 8  # wrong choices are drawn among so many sentences that share most words with the passage
_DOCUMENT_WORDS: Range = (100, 250)
_CONTEXT_LINES = 6
_LINE_CHARACTERS: Range = (16, 80)


def last_word_items() -> list[Item]:
    """Returns passages without their last word, which occurs in them before: reading the passage decides it.

    Each item has `context` and `word`.
    """
    return _draw(map(_last_words, _held_out_prose()))


def continuation_items() -> list[Item]:
    """Returns passages that break off three words into a sentence, with four ways to go on.

    The wrong ones are the rests of other sentences of the same article, among those that share most words with the
    passage. Each item has `context`, `choices` and `label`, the index of the right choice.
    """
    return _draw(map(_continuations, _held_out_prose()))


def code_items() -> list[Item]:
    """Returns six lines of Python with four lines to go on.

    The wrong ones occur elsewhere in the same module with the same indentation. Each item has `context` (which ends
    with a line break), `choices` and `label`.
    """
    calibration = {tuple(window) for source in stdlib_code("calibration") for window in _line_windows(source)}
    return _draw(_next_lines(source, calibration) for source in stdlib_code("held_out"))


def documents() -> list[Item]:
    """Returns the first sentences of each article, up to 250 words; articles with fewer than 100 are left out.

    Each item has `text`.
    """
    lowest, highest = _DOCUMENT_WORDS
    texts = []
    for article in _held_out_prose():
        text = ""
        for sentence in chain.from_iterable(article):
            if word_count(text) + word_count(sentence) > highest:
                break
            text = f"{text} {sentence}".lstrip()
        if word_count(text) >= lowest:
            texts.append(text)
    return [{"text": text} for text in texts]


def paragraphs(article: str) -> Article:
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


def _held_out_prose() -> list[Article]:
    """Returns the held-out articles without the paragraphs that share a sentence with a calibration article."""
    calibration = set(chain.from_iterable(chain.from_iterable(map(paragraphs, wikipedia_articles("calibration")))))
    return [
        [sentences for sentences in paragraphs(article) if calibration.isdisjoint(sentences)]
        for article in wikipedia_articles("held_out")
    ]


def _draw(sources: Iterable[Iterable[Item]]) -> list[Item]:
    """Returns `COUNT` items in random order; no source gives its next item before all have given as many."""
    generator = random.Random(SEED)
    shuffled = [generator.sample(items, len(items)) for items in map(list, sources)]
    rounds = max(map(len, shuffled), default=0)
    drawn = [items[turn] for turn in range(rounds) for items in shuffled if turn < len(items)][:COUNT]
    generator.shuffle(drawn)
    return drawn


def _last_words(article: Article) -> Iterator[Item]:
    for sentences in article:
        for end in range(1, len(sentences) + 1):
            match = _LAST_WORD.fullmatch(_text_before(sentences, end, _PASSAGE_WORDS) or "")
            if match and re.search(rf"\b{match['word']}\b", match["context"]):
                yield {"context": match["context"], "word": match["word"]}


def _continuations(article: Article) -> Iterator[Item]:
    generator = random.Random(SEED)
    fitting = [sentence for sentence in chain.from_iterable(article) if _within(sentence, _SENTENCE_WORDS)]
    long_words = {sentence: set(_LONG_WORD.findall(sentence)) for sentence in fitting}
    for sentences in article:
        others = {sentence: long_words[sentence] for sentence in fitting if sentence not in sentences}
        for index, sentence in enumerate(sentences):
            before = _text_before(sentences, index, _CONTEXT_WORDS)
            if before and _within(sentence, _SENTENCE_WORDS) and len(others) >= CHOICES - 1:
                given, rest = _cut(sentence)
                wrong = [_cut(each)[1] for each in _nearest(others, before)]
                yield {"context": f"{before} {given}", **_choice(rest, wrong, generator)}


def _nearest(long_words: Mapping[str, set[str]], passage: str) -> list[str]:
    """Returns the sentences that share most longer words with a passage; on a tie those that come first."""
    found = set(_LONG_WORD.findall(passage))
    return sorted(long_words, key=lambda sentence: -len(found & long_words[sentence]))[:_NEAREST]


def _next_lines(source: str, calibration: set[tuple[str, ...]]) -> Iterator[Item]:
    generator = random.Random(SEED)
    times = Counter(filter(_is_code, source.split("\n")))
    with_indent = defaultdict(list)
    for line in times:
        with_indent[_indent(line)].append(line)
    for window in _line_windows(source):
        context, line = window[:-1], window[-1]
        if times[line] != 1 or not context[-1].strip() or tuple(window) in calibration:
            continue
        others = [each for each in with_indent[_indent(line)] if each not in window]
        if len(others) >= CHOICES - 1 and max(map(len, context)) <= _LINE_CHARACTERS[1]:
            yield {"context": "\n".join(context) + "\n", **_choice(line, others, generator)}


def _line_windows(source: str) -> Iterator[list[str]]:
    lines = source.split("\n")
    return (lines[start : start + _CONTEXT_LINES + 1] for start in range(len(lines) - _CONTEXT_LINES))


def _choice(right: str, others: Sequence[str], generator: random.Random) -> Item:
    choices = [right, *generator.sample(others, CHOICES - 1)]
    generator.shuffle(choices)
    return {"choices": choices, "label": choices.index(right)}


def _text_before(sentences: Sequence[str], end: int, limits: Range) -> str | None:
    """Returns as few sentences before `end` as reach the lower limit; None if they are not within the limits."""
    start = end
    while start > 0 and word_count(" ".join(sentences[start:end])) < limits[0]:
        start -= 1
    text = " ".join(sentences[start:end])
    return text if _within(text, limits) else None


def _within(text: str, limits: Range) -> bool:
    return limits[0] <= word_count(text) <= limits[1]


def _cut(sentence: str) -> tuple[str, str]:
    parts = sentence.split(" ", _GIVEN_WORDS)
    return " ".join(parts[:-1]), parts[-1]


def _is_code(line: str) -> bool:
    """Returns whether a line has some length and is not plainly a comment or text."""
    text = line.strip()
    return _LINE_CHARACTERS[0] <= len(text) <= _LINE_CHARACTERS[1] and text[0] not in "#\"'"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
