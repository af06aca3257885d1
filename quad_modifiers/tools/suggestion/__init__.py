"""`suggest_recipe`: which linears get 8 bits instead of 4, by what that gains and costs on a model.

`quad recipes suggest` is a thin layer over it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quad_modifiers.tools.suggestion.suggesting import Suggestion as Suggestion
    from quad_modifiers.tools.suggestion.suggesting import suggest_recipe as suggest_recipe

__all__ = ["Suggestion", "suggest_recipe"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.suggesting"), name)
