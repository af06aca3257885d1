"""Ranks, as numbers of coordinates or as a share of the size that they are taken from, such as 1/8."""

import re

Rank = int | str
"""A number of coordinates, or "1/n" for the n-th part of what there is, rounded down."""

_SHARE = re.compile(r"1/([1-9][0-9]*)")


def is_share(rank: object) -> bool:
    """Returns whether a rank is written as a share, "1/8" for an eighth."""
    return isinstance(rank, str) and _SHARE.fullmatch(rank) is not None


def rank_of(rank: Rank, size: int) -> int:
    """Returns the number of coordinates that a rank takes of `size`.

    Raises:
        ValueError: for a text that is no share.

    Example:
        >>> rank_of(64, 576), rank_of("1/8", 576), rank_of("1/8", 7)
        (64, 72, 0)
    """
    if isinstance(rank, int):
        return rank
    found = _SHARE.fullmatch(rank)
    if found is None:
        raise ValueError(f"{rank!r} is no share; write 1/8 for an eighth")
    return size // int(found[1])
