"""The offline tasks' items as data sets; the YAML files in tasks/ name these functions as `custom_dataset`."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from datasets import Dataset

from quad_modifiers.tools.evaluation import items


def last_word(**_: Any) -> dict[str, Dataset]:
    """Returns the items of `quad_lastword`."""
    return _test_split(items.last_word_items)


def continuation(**_: Any) -> dict[str, Dataset]:
    """Returns the items of `quad_continuation`."""
    return _test_split(items.continuation_items)


def code(**_: Any) -> dict[str, Dataset]:
    """Returns the items of `quad_code`."""
    return _test_split(items.code_items)


def word_perplexity(**_: Any) -> dict[str, Dataset]:
    """Returns the documents of `quad_wordppl`."""
    return _test_split(items.documents)


@lru_cache
def _test_split(make: Callable[[], list[items.Item]]) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(make())}
