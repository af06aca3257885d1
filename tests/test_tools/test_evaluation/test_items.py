"""The offline tasks' items: what they are made of, and that they stay what they are."""

from __future__ import annotations

import json
from collections import Counter
from hashlib import sha256

import pytest

from quad_modifiers.data import stdlib_code, wikipedia_articles
from quad_modifiers.tools.evaluation import items
from quad_modifiers.tools.evaluation.items import paragraphs, word_count

pytest.importorskip("gensim")

MAKERS = {
    "lastword": items.last_word_items,
    "continuation": items.continuation_items,
    "code": items.code_items,
    "wordppl": items.documents,
}


@pytest.fixture(scope="module")
def held_out() -> str:
    """The prose that items may be made of, with single spaces."""
    return as_one(wikipedia_articles("held_out"))


@pytest.fixture(scope="module")
def calibration() -> str:
    return as_one(wikipedia_articles("calibration"))


def as_one(articles: list[str]) -> str:
    return "\n".join(" ".join(line.split()) for article in articles for line in article.split("\n"))


def digest(made: list[items.Item]) -> str:
    return sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def made() -> dict[str, list[items.Item]]:
    """The items of each task."""
    return {name: make() for name, make in MAKERS.items()}


def test_items_are_the_same_every_time(made: dict[str, list[items.Item]]) -> None:
    assert {name: digest(make()) for name, make in MAKERS.items()} == {name: digest(of) for name, of in made.items()}


def test_items_of_prose_are_those_of_version_1(made: dict[str, list[items.Item]]) -> None:
    """A change here changes the tasks: raise their version in the YAML files, measure full precision again."""
    assert {name: digest(made[name]) for name in ("lastword", "continuation", "wordppl")} == {
        "lastword": "b60ccbce8bc8f6a9",
        "continuation": "2911c7cb69794f73",
        "wordppl": "15fab925e1283224",
    }


@pytest.mark.parametrize("name", ["lastword", "continuation", "code"])
def test_there_are_enough(made: dict[str, list[items.Item]], name: str) -> None:
    assert len(made[name]) >= 400
    assert len({json.dumps(item) for item in made[name]}) == len(made[name])


def test_last_words_stand_in_their_passage(made: dict[str, list[items.Item]], held_out: str, calibration: str) -> None:
    for item in made["lastword"]:
        assert item["word"] in item["context"]
        passage = f"{item['context']} {item['word']}."
        assert passage in held_out
        assert passage not in calibration
        assert 35 <= word_count(passage) <= 75


def test_continuations_follow_and_the_others_do_not(
    made: dict[str, list[items.Item]], held_out: str, calibration: str
) -> None:
    for item in made["continuation"]:
        behind = held_out.find(item["context"]) + len(item["context"]) + 1
        follows = [held_out.startswith(choice, behind) for choice in item["choices"]]
        assert follows == [index == item["label"] for index in range(4)]
        assert item["context"] not in calibration


def test_wrong_continuations_are_from_the_same_article(made: dict[str, list[items.Item]]) -> None:
    articles = [as_one([article]) for article in wikipedia_articles("held_out")]
    for item in made["continuation"][:20]:
        assert any(all(choice in article for choice in item["choices"]) for article in articles)


def test_lines_of_code_follow_and_the_others_stand_elsewhere(made: dict[str, list[items.Item]]) -> None:
    sources = stdlib_code("held_out")
    lines = [set(source.split("\n")) for source in sources]
    calibration = "\n".join(stdlib_code("calibration"))
    for item in made["code"]:
        right = f"{item['context']}{item['choices'][item['label']]}"
        assert any(lines[index].issuperset(item["choices"]) and right in source for index, source in enumerate(sources))
        assert right not in calibration
        assert len({len(choice) - len(choice.lstrip()) for choice in item["choices"]}) == 1
        assert not {*item["context"].split("\n")} & {*item["choices"]}


@pytest.mark.parametrize("name", ["continuation", "code"])
def test_no_place_is_right_more_often(made: dict[str, list[items.Item]], name: str) -> None:
    right = Counter(item["label"] for item in made[name])
    assert sorted(right) == [0, 1, 2, 3]
    assert min(right.values()) > 0.18 * len(made[name])
    assert all(len(set(item["choices"])) == 4 for item in made[name])


def test_documents(made: dict[str, list[items.Item]], held_out: str, calibration: str) -> None:
    assert len(made["wordppl"]) > 40
    for item in made["wordppl"]:
        longest = max(item["text"].split(". "), key=len)
        assert longest in held_out
        assert longest not in calibration
        assert 100 <= word_count(item["text"]) <= 250


def test_paragraphs() -> None:
    article = "\n".join(
        [
            "==Heading==",
            "* A list.",
            "Mr. J. Smith of the U.S. Army came.  He saw 3.5 of them (all\u00a0red). Nobody else did!",
            "a caption.",
            "A [[link]] that stayed.",
            "No stop",
        ]
    )
    assert paragraphs(article) == [
        ["Mr. J. Smith of the U.S. Army came.", "He saw 3.5 of them (all red).", "Nobody else did!"]
    ]
