import importlib.machinery
import importlib.util
import subprocess
import sys

import pytest

from quad_modifiers.data import stdlib_code, wikipedia, wikipedia_articles
from quad_modifiers.data.wikipedia import clean_article

needs_articles = pytest.mark.skipif(not wikipedia.has_gensim(), reason="gensim is not installed")


@needs_articles
def test_halves_are_disjoint_and_in_file_order():
    calibration, held_out = wikipedia_articles("calibration"), wikipedia_articles("held_out")
    assert not set(calibration) & set(held_out)
    assert 90 <= len(calibration) + len(held_out) <= 110
    assert calibration[0].startswith("Anarchism is a political philosophy")
    assert "algorithm" in held_out[-1]


@needs_articles
def test_articles_hold_no_residue():
    for article in wikipedia_articles("calibration"):
        assert len(article) >= 1000
        assert not article.lower().startswith("#redirect")
        for residue in ("''", "\n\n\n", "  ", "()", " \n"):
            assert residue not in article


@needs_articles
def test_callers_cannot_change_each_others_articles():
    wikipedia_articles("held_out").clear()
    assert wikipedia_articles("held_out")


def test_clean_article():
    assert clean_article("\n\n\n '''A''' ( ), an ''a''  b\u00a0 c \n\n\n\n== D ==\n") == "A , an a b c\n\n== D =="


@pytest.mark.parametrize("source", [pytest.param(wikipedia_articles, marks=needs_articles), stdlib_code])
def test_unknown_part(source):
    with pytest.raises(ValueError, match="'calibration' or 'held_out', not 'test'"):
        source("test")


def test_missing_gensim_names_the_extra_and_the_option(monkeypatch):
    wikipedia._all_articles.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'quad-modifiers\[text\]'.*--dataset"):
        wikipedia_articles("calibration")


def test_missing_file_says_so(monkeypatch, tmp_path):
    wikipedia._all_articles.cache_clear()
    empty = importlib.machinery.ModuleSpec("gensim", None, is_package=True)
    empty.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: empty)
    with pytest.raises(FileNotFoundError, match="gensim has no enwiki-latest"):
        wikipedia_articles("calibration")


def test_stdlib_code_is_code_in_two_halves():
    calibration, held_out = stdlib_code("calibration"), stdlib_code("held_out")
    assert len(calibration) == len(held_out) == 29
    assert not set(calibration) & set(held_out)
    assert all("def " in source for source in calibration + held_out)
    assert calibration == stdlib_code("calibration")


def test_importing_text_and_calibration_stays_light():
    code = (
        "import sys, quad_modifiers.data.wikipedia, quad_modifiers.data.calibration, quad_modifiers.tools.evaluation;"
        "print([name for name in ('llmcompressor', 'gensim', 'datasets') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
