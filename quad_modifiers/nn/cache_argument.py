"""What transformers calls a cache of keys and values: `past_key_values`, and `cache` in newer releases."""

import inspect
from collections.abc import Callable
from typing import Any

OLD, NEW = "past_key_values", "cache"


def cache_argument(forward: Callable[..., Any]) -> str:
    """Returns the name by which the forward of a decoder or a layer takes its cache."""
    return NEW if NEW in inspect.signature(forward).parameters else OLD


def output_field(output: type) -> str:
    """Returns the name by which an output class of transformers hands it back."""
    return NEW if NEW in getattr(output, "__dataclass_fields__", {}) else OLD
