"""Ranks as numbers and as shares."""

import pytest

from quad_modifiers.projection.rank import is_share, rank_of


@pytest.mark.parametrize(
    ("rank", "size", "wanted"),
    [(0, 576, 0), (64, 576, 64), ("1/8", 576, 72), ("1/8", 63, 7), ("1/8", 7, 0), ("1/1", 12, 12), ("1/16", 4096, 256)],
)
def test_what_they_take(rank: int | str, size: int, wanted: int) -> None:
    assert rank_of(rank, size) == wanted
    assert is_share(rank) == isinstance(rank, str)


@pytest.mark.parametrize("text", ["1/0", "2/8", "1/", "/8", "0.125", " 1/8", "1/8x", "64"])
def test_what_is_no_share(text: str) -> None:
    assert not is_share(text)
    with pytest.raises(ValueError, match="is no share; write 1/8 for an eighth"):
        rank_of(text, 64)
