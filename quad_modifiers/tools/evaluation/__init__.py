"""`evaluate` and `perplexity`: lm-eval's tasks beside the original model, and perplexity over token windows."""

from typing import TYPE_CHECKING, Any

from quad_modifiers.tools.evaluation.window_perplexity import Perplexity, perplexity

if TYPE_CHECKING:
    from quad_modifiers.tools.evaluation.evaluator import evaluate as evaluate

__all__ = ["Perplexity", "evaluate", "perplexity"]


def __getattr__(name: str) -> Any:
    if name == "evaluate":  # imports numpy and pydantic, which perplexity does without
        from quad_modifiers.tools.evaluation.evaluator import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
