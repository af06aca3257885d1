"""Texts with halves of characters, and what is no text."""

from __future__ import annotations

import json

import pytest

from quad_modifiers.data.readable import readable
from quad_modifiers.data.windows import token_stream


def test_halves_of_characters_are_replaced_and_named(caplog) -> None:
    texts = ["plain", "a cat \ud83d sleeps", "\ude00 again", json.loads('"whole \\ud83d\\ude00"')]
    assert readable(texts) == ["plain", "a cat � sleeps", "� again", "whole \N{GRINNING FACE}"]
    (record,) = caplog.records
    assert "2 of 4 texts" in record.getMessage()
    assert r"the first is text 1, at 'a cat \ud83d sleeps'" in record.getMessage()


def test_a_pair_is_one_character(caplog) -> None:
    assert readable(["\ud83d\ude00"]) == ["\N{GRINNING FACE}"]
    assert not caplog.records


def test_a_broken_text_is_tokenized(toy_tokenizer) -> None:
    assert len(token_stream(toy_tokenizer, ["one \udfff two"])) > 4


@pytest.mark.parametrize("bad", [None, 7, b"bytes", float("nan")])
def test_what_is_no_text_is_named(bad) -> None:
    with pytest.raises(TypeError, match=f"text 1 is a {type(bad).__name__}"):
        readable(["text", bad])
