"""Several sources with weights: how they are written, and how many samples each gives."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_WEIGHTED = re.compile(r"(?P<name>\S.*):(?P<weight>\d+(?:\.\d*)?|\.\d+)")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Weighted:
    """A source and its share.

    Attributes:
        source: any data set of `calibration_windows`.
        share: its share of the samples, above 0; those of a mixture sum to 1.
    """

    source: Any
    share: float


def mixture_of(source: Any) -> list[Weighted]:
    """Returns the sources that a data set consists of; one that is no mixture has the share 1.

    A mixture is a list of pairs (source, weight), of strings "NAME:WEIGHT", or of names of local files or of data sets
    "OWNER/NAME" without weights. Any other list of strings is a list of texts.

    Raises:
        ValueError: if only some have a weight, or one is not above 0.
    """
    if isinstance(source, str):
        return [Weighted(_parsed(source)[0], 1.0)]
    if not isinstance(source, (list, tuple)) or not source:
        return [Weighted(source, 1.0)]
    if all(_is_pair(each) for each in source):
        return _normalized([(each[0], float(each[1])) for each in source])
    if all(isinstance(each, str) and _is_named(*_parsed(each)) for each in source):
        return _normalized([_parsed(each) for each in source])
    return [Weighted(source, 1.0)]


def named_sources(names: Sequence[str]) -> Any:
    """Returns what the names given to an option mean as a data set: None, one name, or pairs with weights.

    Raises:
        ValueError: if only some have a weight, or one is not above 0.
    """
    if not names:
        return None
    if len(names) == 1:
        return _parsed(names[0])[0]
    return [(each.source, each.share) for each in _normalized([_parsed(name) for name in names])]


def shares_of(parts: Sequence[Weighted], count: int) -> list[int]:
    """Returns how many of `count` samples each source gives, at least one, `count` in all.

    Raises:
        ValueError: if there are more sources than samples.
    """
    if count < len(parts):
        raise ValueError(f"{count} samples cannot come from {len(parts)} sources; ask for more samples")
    exact = [part.share * count for part in parts]
    counts = [max(1, math.floor(each)) for each in exact]
    while sum(counts) != count:
        step = 1 if sum(counts) < count else -1
        able = [index for index in range(len(parts)) if step > 0 or counts[index] > 1]
        counts[max(able, key=lambda index: step * (exact[index] - counts[index]))] += step
    return counts


def _parsed(text: str) -> tuple[str, float | None]:
    match = _WEIGHTED.fullmatch(text)
    if match is None or os.path.exists(text):
        return text, None
    return match["name"], float(match["weight"])


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and type(value[1]) in (int, float)


def _is_named(name: str, weight: float | None) -> bool:
    """Returns whether a string of a list is meant as a name, which no text looks like."""
    if weight is not None:
        return not any(character.isspace() for character in name) or os.path.exists(name)
    return bool(_HUB_NAME.fullmatch(name)) or os.path.exists(name)


def _normalized(weighted: Sequence[tuple[Any, float | None]]) -> list[Weighted]:
    given = [weight for _, weight in weighted if weight is not None]
    if given and len(given) < len(weighted):
        without = [str(source) for source, weight in weighted if weight is None]
        raise ValueError(f"{', '.join(without)} has no weight, but another source has one; give all a weight, or none")
    for source, weight in weighted:
        if weight is not None and not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"the weight of {source} must be above 0, not {weight:g}; leave the source out")
    total = sum(given) or len(weighted)
    return [Weighted(source, (1.0 if weight is None else weight) / total) for source, weight in weighted]
