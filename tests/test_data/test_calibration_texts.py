"""The default calibration text: prose and code, of the calibration halves alone."""

from __future__ import annotations

import pytest

pytest.importorskip("gensim")

from quad_modifiers.data import calibration_texts, stdlib_code, wikipedia_articles


def test_articles_and_modules_of_the_calibration_halves() -> None:
    texts = calibration_texts()
    articles, modules = wikipedia_articles("calibration"), stdlib_code("calibration")
    assert [text for text in texts if text in set(articles)] == articles
    code = [text for text in texts if text not in set(articles)]
    assert code == [module for module in modules if module in set(code)]
    assert not set(texts) & {*wikipedia_articles("held_out"), *stdlib_code("held_out")}
    assert 0.2 < sum(map(len, code)) / sum(map(len, texts)) < 0.4


def test_every_stretch_has_both_kinds() -> None:
    texts, articles = calibration_texts(), set(wikipedia_articles("calibration"))
    size = len(texts) // 8
    for start in range(0, len(texts) - size + 1, size):
        kinds = {text in articles for text in texts[start : start + size]}
        assert kinds == {True, False}
